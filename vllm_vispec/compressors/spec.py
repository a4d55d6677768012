"""What a head does with an image's tokens, as a short text: `prune:20`, `concat(conv:3,pool:20)`.

SpecVLM's elastic visual compressor (arXiv 2509.11815, section 3.3) has primitives and three ways to
combine them; ViSpec's query adaptor (arXiv 2509.15235) is one entry more. The text stands in a
head's config.json and in training recipes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vllm_vispec.utils.errors import ViSpecError

MAX_AMOUNT = 4096


class Primitive(NamedTuple):
    """An entry of the registry, without its tensors.

    Attributes:
        amount: what the number behind the colon means, "" if there is none.
        default: the number if none is given; the paper's (its table 4 and section 4.1).
    """

    amount: str = ""
    default: int = 0


class Combination(NamedTuple):
    """A way to use several primitives at once.

    Attributes:
        default: branches if none are given; the paper's section 4.1.
        gated: a gate reads the target's state at the prompt's end and decides.
        same_amount: all branches have one ratio, so that they are of one length.
        balanced: training keeps the gate's choices even, since only what is chosen learns.
    """

    default: str
    gated: bool = False
    same_amount: bool = False
    balanced: bool = False


# ViSpec's own adaptor, learned queries; their number is HeadConfig.num_query_tokens.
QUERY = "query"
# MSD (arXiv 2505.14260): nothing is compressed, image rows are the embeddings themselves.
IDENTITY = "identity"
PRIMITIVES: Mapping[str, Primitive] = {
    QUERY: Primitive(),
    IDENTITY: Primitive(),
    "prune": Primitive("ratio", 20),
    "pool": Primitive("ratio", 20),
    "conv": Primitive("ratio", 3),
    "resampler": Primitive("queries", 2),
    "text_only": Primitive(),
}
COMBINATIONS: Mapping[str, Combination] = {
    "concat": Combination("prune:20,pool:20,conv:3,resampler:2"),
    "weighted": Combination("prune:3,pool:3,conv:3", gated=True, same_amount=True),
    "select": Combination(
        "prune:20,pool:20,conv:3,resampler:2,text_only", gated=True, balanced=True
    ),
}


@dataclass(frozen=True)
class CompressorSpec:
    """One primitive, or a combination of several.

    Attributes:
        name: key of `PRIMITIVES` or `COMBINATIONS`.
        amount: ratio or number of queries; 0 where the primitive has none.
        branches: the primitives of a combination.
    """

    name: str
    amount: int = 0
    branches: tuple[CompressorSpec, ...] = ()

    def __str__(self) -> str:
        if self.branches:
            return f"{self.name}({','.join(map(str, self.branches))})"
        return f"{self.name}:{self.amount}" if PRIMITIVES[self.name].amount else self.name

    @property
    def primitives(self) -> tuple[CompressorSpec, ...]:
        """The branches, or the primitive itself."""
        return self.branches or (self,)

    @property
    def gated(self) -> bool:
        """Whether a gate decides per request."""
        return self.name in COMBINATIONS and COMBINATIONS[self.name].gated

    @property
    def balanced(self) -> bool:
        """Whether training evens the gate's choices out."""
        return self.name in COMBINATIONS and COMBINATIONS[self.name].balanced

    @property
    def is_query(self) -> bool:
        """Whether this is ViSpec's adaptor, whose last query is the global feature."""
        return self.name == QUERY

    @property
    def makes_layer_inputs(self) -> bool:
        """Whether tokens go into the decoder layer as they are; others go through `fc`."""
        return self.name in (QUERY, IDENTITY)


def parse_compressor(text: str) -> CompressorSpec:
    """Read a compressor's text; the paper's numbers stand in for those left out.

    Raises:
        ViSpecError: a name is unknown, a number is missing or out of range, or branches do not go
            together; says what is allowed.
    """
    matched = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\)|:\s*([^\s()]*))?\s*", text)
    if matched is None:
        raise _wrong(text, 'write it like "prune:20" or "select(prune:20,text_only)"')
    name, inside, amount = matched.groups()
    if name in COMBINATIONS:
        return _combination(text, name, inside, amount)
    if name not in PRIMITIVES:
        raise _wrong(text, f"use one of {', '.join((*PRIMITIVES, *COMBINATIONS))}")
    if inside is not None:
        raise _wrong(text, f"{name} has no branches")
    return _primitive(text, name, amount)


def _primitive(text: str, name: str, amount: str | None) -> CompressorSpec:
    entry = PRIMITIVES[name]
    if not entry.amount:
        if amount is not None:
            raise _wrong(text, f"{name} takes no number")
        return CompressorSpec(name)
    value = entry.default if amount is None else int(amount) if amount.isdecimal() else 0
    if not 1 <= value <= MAX_AMOUNT:
        raise _wrong(text, f"the {entry.amount} of {name} is a whole number from 1 to {MAX_AMOUNT}")
    return CompressorSpec(name, value)


def _combination(text: str, name: str, inside: str | None, amount: str | None) -> CompressorSpec:
    entry = COMBINATIONS[name]
    if amount is not None:
        raise _wrong(text, f"write the branches of {name} in parentheses, like {name}(prune:20)")
    parts = (entry.default if inside is None else inside).split(",")
    branches = tuple(parse_compressor(part) for part in parts)
    if len(branches) < 2:
        raise _wrong(text, f"{name} needs at least two branches")
    for branch in branches:
        if branch.branches or branch.makes_layer_inputs:
            raise _wrong(text, f"{branch.name} cannot be a branch of {name}")
    if entry.same_amount and (
        len({branch.amount for branch in branches}) > 1
        or any(PRIMITIVES[branch.name].amount != "ratio" for branch in branches)
    ):
        raise _wrong(text, f"the branches of {name} are prune, pool or conv with one ratio")
    return CompressorSpec(name, 0, branches)


def _wrong(text: str, remedy: str) -> ViSpecError:
    return ViSpecError(f"compressor {text!r} cannot be used: {remedy}")

"""The variants that are compared: how each is served. A new one is one entry of `VARIANTS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm_vispec.bench.heads import plain_eagle_head, zeroed_head
from vllm_vispec.bench.schedules import K_SETTING, SETTING, Ranges, speculative_config
from vllm_vispec.utils.errors import ViSpecError

# vLLM's lookup looks for the longest repeated n-gram between these lengths.
NGRAM = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}
NO_DRAFT = {K_SETTING: 1, SETTING: [[1, 1, 0]]}
"""K = 0 as vLLM takes it: the draft is loaded and kept up, and proposes nothing."""


@dataclass(frozen=True)
class Heads:
    """What the variants draft with; hub ids stay as they are.

    Attributes:
        target: folder or hub id.
        head: ViSpec head, "" if there is none.
        eagle_head: head of the variant "eagle", "" if there is none.
        folder: where heads that are made for a run lie.
        schedule: K by batch size of the variant "vispec_tuned", empty if there is none.
    """

    target: str
    head: str
    eagle_head: str
    folder: Path
    schedule: Ranges = ()


@dataclass(frozen=True)
class Variant:
    """One way to serve the target.

    Attributes:
        summary: what a report says about it.
        needs: options without which it cannot be served.
        draft: makes what goes into vLLM's speculative config besides K; None: no speculation. A
            variant that chooses K itself puts it there too.
    """

    summary: str
    draft: Callable[[Heads], Mapping[str, Any]] | None
    needs: tuple[str, ...] = ()

    def speculative_config(self, heads: Heads, num_tokens: int) -> dict[str, Any] | None:
        """Return vLLM's speculative config for this variant, None without speculation.

        Args:
            num_tokens: K; 0 keeps the draft up without proposing anything.

        Raises:
            ViSpecError: the variant's head cannot be used.
        """
        if self.draft is None:
            return None
        draft = self.draft(heads)
        if K_SETTING in draft:
            return dict(draft)
        return {**draft, **({K_SETTING: num_tokens} if num_tokens else NO_DRAFT)}


def _eagle(heads: Heads) -> Mapping[str, Any]:
    head = plain_eagle_head(heads.eagle_head, heads.target, heads.folder / "eagle")
    return {"method": "eagle", "model": head}


def _vispec_zeroed(heads: Heads) -> Mapping[str, Any]:
    return {"method": "vispec", "model": zeroed_head(heads.head, heads.folder / "vispec_zeroed")}


def _vispec(heads: Heads) -> Mapping[str, Any]:
    return {"method": "vispec", "model": heads.head}


def _vispec_tuned(heads: Heads) -> Mapping[str, Any]:
    return speculative_config(_vispec(heads), heads.schedule) or {}


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "plain": Variant("vLLM without speculation", None),
        "ngram": Variant(
            "vLLM's n-gram lookup in the prompt and the answer; steps in which it finds nothing "
            "are not counted",
            lambda _: NGRAM,
        ),
        "eagle": Variant("vLLM's EAGLE with a text-trained head", _eagle, ("--eagle-head",)),
        "vispec_zeroed": Variant(
            "ViSpec whose vision adaptor puts out zeros", _vispec_zeroed, ("--head",)
        ),
        "vispec": Variant("ViSpec", _vispec, ("--head",)),
        "vispec_tuned": Variant(
            "ViSpec with K by the number of running requests",
            _vispec_tuned,
            ("--head", "--schedule"),
        ),
    }
)


def check_variants(names: Sequence[str], options: Mapping[str, object]) -> None:
    """Refuse variants that are unknown or lack what they draft with.

    Args:
        options: value of every option that a variant may need.

    Raises:
        ViSpecError: names the variant and what is possible.
    """
    for name in names:
        if name not in VARIANTS:
            raise ViSpecError(f"--sides: {name} is unknown: choose from {', '.join(VARIANTS)}")
        for option in VARIANTS[name].needs:
            if not options.get(option):
                raise ViSpecError(f"--sides: {name} needs {option}: give it, or leave the side out")

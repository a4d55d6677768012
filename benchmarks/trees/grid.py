"""What is measured: drafts by name, the conditions they are measured under, and the parts.

A new draft or part is one entry. A draft that several parts name is measured once per condition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from vllm_vispec.bench.schedules import SETTING as LOAD_SETTING
from vllm_vispec.trees.settings import TreeSettings

VISPEC, DRAFT_VLM = "vispec", "draft_vlm"
NODES = 29  # and the root: 30, as ViSpec's and EAGLE-2's published settings
BATCHES = (1, 2, 4, 8, 16)
Schedule = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Draft:
    """How tokens are drafted.

    Attributes:
        nodes: vLLM's ``num_speculative_tokens``: K of a chain, or a tree's nodes without its root.
        tree: None for a chain.
        schedule: ``num_speculative_tokens_per_batch_size``, empty for none.
        head: Which of the heads drafts, `VISPEC` or `DRAFT_VLM`.

    Raises:
        ViSpecError: The tree cannot have so many nodes.
    """

    nodes: int
    tree: TreeSettings | None = None
    schedule: Schedule = ()
    head: str = VISPEC

    def __post_init__(self) -> None:
        if self.tree is not None:
            self.tree.check_nodes(self.nodes)

    @property
    def policy(self) -> str:
        """Name of the tree's rule, "chain" without a tree."""
        return self.tree.policy if self.tree else "chain"

    @property
    def levels(self) -> int:
        """Most draft tokens on a path."""
        return self.tree.levels if self.tree else self.nodes

    @property
    def name(self) -> str:
        """Of its files and in the JSON."""
        return "-".join((*self._head(), self.policy, *self._sizes(), *self._load()))

    @property
    def label(self) -> str:
        """In tables and plots."""
        if self.tree is None:
            words = f"chain, K = {self.nodes}"
        else:
            words = f"{self.policy}, depth {self.tree.depth}, top_k {self.tree.top_k}"
            words += f", {self.nodes} nodes"
            words += "" if self.tree.threshold is None else f", p >= {self.tree.threshold:g}"
        words += ", load schedule" if self.schedule else ""
        return f"draft VLM: {words}" if self.head == DRAFT_VLM else words

    def speculative(self) -> dict[str, Any]:
        """Keys of the speculative config besides method and model."""
        found: dict[str, Any] = {"num_speculative_tokens": self.nodes}
        if self.tree is not None:
            found["tree"] = self.tree.model_dump(exclude_none=True)
        if self.schedule:
            found[LOAD_SETTING] = [list(entry) for entry in self.schedule]
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "label": self.label,
            "head": self.head,
            "levels": self.levels,
            **self.speculative(),
        }

    def _head(self) -> tuple[str, ...]:
        return () if self.head == VISPEC else (self.head,)

    def _sizes(self) -> tuple[str, ...]:
        if self.tree is None:
            return (f"K{self.nodes}",)
        sizes = f"d{self.tree.depth}", f"k{self.tree.top_k}", f"n{self.nodes}"
        return sizes if self.tree.threshold is None else (*sizes, f"p{self.tree.threshold:g}")

    def _load(self) -> tuple[str, ...]:
        return ("load",) if self.schedule else ()


@dataclass(frozen=True)
class Condition:
    """Under what a draft is measured.

    Attributes:
        name: of its folder.
        has_batches: several batch sizes, not only one request at a time.
    """

    name: str
    temperature: float = 0.0
    has_batches: bool = False


class Part(StrEnum):
    """Parts of the evidence."""

    POLICIES = "policies"
    NODES = "nodes"
    BATCH = "batch"
    TEMPERATURE = "temperature"
    DRAFT_VLM = "draft_vlm"
    DRAFT_VLM_BATCH = "draft_vlm_batch"


def eagle2(depth: int, top_k: int = 8, nodes: int = NODES, **others: Any) -> Draft:
    """A tree of EAGLE-2's policy."""
    return Draft(nodes, TreeSettings(depth=depth, top_k=top_k), **others)


def confident(depth: int, top_k: int, nodes: int, threshold: float, **others: Any) -> Draft:
    """A tree whose paths end where the draft is unsure."""
    tree = TreeSettings(policy="spec_llava", depth=depth, top_k=top_k, threshold=threshold)
    return Draft(nodes, tree, **others)


# Deep enough for this head, and its paths still fit a tree of 7 nodes.
CHAIN, TREE = Draft(5), eagle2(5)
# The longest chain, and trees as deep: with branches for one request, with one path for any load.
LONG, PATH = Draft(16), confident(15, 1, 16, 0.3)
_BRANCHES: Schedule = ((1, 1, 19), (2, max(BATCHES), 16))
_PATHS: Schedule = ((1, 8, 16), (9, max(BATCHES), 12))
LOADED = confident(15, 2, 19, 0.2, schedule=_BRANCHES)
LOADED_PATH = replace(PATH, schedule=_PATHS)
# The same for the draft VLM, as deep as its longest chain.
VLM_LOADED = confident(11, 3, 19, 0.1, head=DRAFT_VLM, schedule=((1, 1, 19), (2, max(BATCHES), 12)))
VLM_LOADED_PATH = confident(
    11, 1, 12, 0.3, head=DRAFT_VLM, schedule=((1, 8, 12), (9, max(BATCHES), 8))
)
# K = depth + 1 for every depth below, and 5, which most heads are served with.
CHAINS = tuple(Draft(count) for count in (4, 5, 6, 8, 12, 16))
_POLICIES = (
    *CHAINS,
    *(eagle2(depth) for depth in (3, 5, 7)),
    # So deep that a chain is far from its ceiling; narrow ones cost little more than it does.
    *(eagle2(11, top_k, nodes) for top_k, nodes in ((10, 119), (8, 59), (3, 19))),
    *(eagle2(15, top_k, nodes) for top_k, nodes in ((10, 127), (4, 59), (3, 23))),
    Draft(NODES, TreeSettings(policy="spec_llava", depth=5)),
    Draft(NODES, TreeSettings(policy="entropy", depth=5)),
    replace(LOADED, schedule=()),
    PATH,
)
# Small trees are narrow ones: what is drafted and not kept costs a draft pass all the same.
_SIZES = (eagle2(5, 2, 7), eagle2(5, 4, 15), eagle2(5, 8, NODES), eagle2(5, 8, 59))
_VLM_CHAINS = tuple(Draft(count, head=DRAFT_VLM) for count in (5, 6, 12))
_VLM = (
    *_VLM_CHAINS,
    eagle2(5, head=DRAFT_VLM),
    eagle2(11, 10, 119, head=DRAFT_VLM),
    confident(5, 3, 15, 0.1, head=DRAFT_VLM),
    replace(VLM_LOADED_PATH, schedule=()),
)
_GREEDY, _SAMPLED = Condition("greedy"), Condition("sampled", temperature=1.0)
_BATCHED = Condition("batched", has_batches=True)


PARTS: Mapping[Part, tuple[Condition, tuple[Draft, ...]]] = MappingProxyType(
    {
        Part.POLICIES: (_GREEDY, _POLICIES),
        Part.NODES: (_GREEDY, (Draft(6), *_SIZES)),
        Part.BATCH: (_BATCHED, (Draft(6), LONG, TREE, LOADED, LOADED_PATH)),
        Part.TEMPERATURE: (_SAMPLED, (CHAIN, TREE, LONG, PATH)),
        Part.DRAFT_VLM: (_GREEDY, _VLM),
        Part.DRAFT_VLM_BATCH: (_BATCHED, (*_VLM_CHAINS[1:], VLM_LOADED, VLM_LOADED_PATH)),
    }
)


@dataclass(frozen=True)
class Questions:
    """Held-out samples, `per_family` of each family in a row.

    Attributes:
        batches: Requests that are asked at a time.
        per_batch_size: Least questions that each of these sizes answers.
    """

    per_family: int
    families: tuple[str, ...]
    batches: tuple[int, ...] = BATCHES
    per_batch_size: int = 8

    def family(self, sample: int, condition: Condition) -> str:
        """Family of a sample by its number."""
        return self.families[sample // self.count_per_family(condition)]

    def count_per_family(self, condition: Condition) -> int:
        """Samples of each family; the largest batch asks no question twice."""
        if not condition.has_batches:
            return self.per_family
        most = max(*self.batches, self.per_batch_size)
        return -(-most // len(self.families))

    def calls(self, condition: Condition) -> list[tuple[int, ...]]:
        """Samples that are asked at a time, families in turns so that every batch is a mixture."""
        count = self.count_per_family(condition)
        mixed = [
            family * count + place for place in range(count) for family in range(len(self.families))
        ]
        if not condition.has_batches:
            return [(sample,) for sample in mixed]
        return [call for size in self.batches for call in self._of_size(mixed, size)]

    def plan(self, condition: Condition) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
        """The samples of each call, and their families."""
        return [
            (call, tuple(self.family(sample, condition) for sample in call))
            for call in self.calls(condition)
        ]

    def _of_size(self, mixed: Sequence[int], size: int) -> list[tuple[int, ...]]:
        calls = -(-self.per_batch_size // size)
        most = min(calls, len(mixed) // size)
        return [tuple(mixed[i * size : (i + 1) * size]) for i in range(most)]

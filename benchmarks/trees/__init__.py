"""Draft trees beside chains and plain vLLM; see docs/evidence/trees.md.

Here is what is measured: drafts by name, the conditions they are measured under, and the parts of
the evidence. A new draft or part is one entry. A draft that several parts name is measured once per
condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from vllm_vispec.bench.schedules import SETTING as LOAD_SETTING
from vllm_vispec.bench.schedules import Ranges
from vllm_vispec.trees.settings import TreeSettings

VISPEC, DRAFT_VLM, SIBLING = "vispec", "draft_vlm", "sibling"
_CALLED = {DRAFT_VLM: "draft VLM: ", SIBLING: "sibling: "}
NODES = 29  # and the root: 30, as ViSpec's and EAGLE-2's published settings
BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Draft:
    """How tokens are drafted.

    Attributes:
        nodes: vLLM's ``num_speculative_tokens``: K of a chain, or a tree's nodes without its root.
        tree: None for a chain.
        schedule: ``num_speculative_tokens_per_batch_size``, empty for none.
        head: Which model drafts: `VISPEC`, `DRAFT_VLM` or `SIBLING`.
        images: What a sibling sees of images; None is its default.

    Raises:
        ViSpecError: The tree cannot have so many nodes.
    """

    nodes: int
    tree: TreeSettings | None = None
    schedule: Ranges = ()
    head: str = VISPEC
    images: str | None = None

    def __post_init__(self) -> None:
        if self.tree is not None:
            self.tree.check_nodes(self.nodes)

    @property
    def levels(self) -> int:
        """Most draft tokens on a path."""
        return self.tree.levels if self.tree else self.nodes

    @property
    def name(self) -> str:
        """Of its files and in the JSON."""
        parts = [] if self.head == VISPEC else [self.head]
        if self.tree is None:
            parts += ["chain", f"K{self.nodes}"]
        else:
            tree = self.tree
            parts += [tree.policy, f"d{tree.depth}", f"k{tree.top_k}", f"n{self.nodes}"]
            parts += [] if tree.threshold is None else [f"p{tree.threshold:g}"]
        parts += [self.images.replace(":", "")] if self.images else []
        return "-".join([*parts, "load"] if self.schedule else parts)

    @property
    def label(self) -> str:
        """In tables and plots."""
        if self.tree is None:
            words = f"chain, K = {self.nodes}"
        else:
            words = f"{self.tree.policy}, depth {self.tree.depth}, top_k {self.tree.top_k}"
            words += f", {self.nodes} nodes"
            words += "" if self.tree.threshold is None else f", p >= {self.tree.threshold:g}"
        words += f", images {self.images}" if self.images else ""
        words += ", load schedule" if self.schedule else ""
        return _CALLED.get(self.head, "") + words

    def speculative(self) -> dict[str, Any]:
        """Keys of the speculative config besides method and model."""
        found: dict[str, Any] = {"num_speculative_tokens": self.nodes}
        if self.tree is not None:
            found["tree"] = self.tree.model_dump(exclude_none=True)
        if self.images:
            found["images"] = self.images
        if self.schedule:
            found[LOAD_SETTING] = [list(entry) for entry in self.schedule]
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        named = {"name": self.name, "label": self.label, "head": self.head, "levels": self.levels}
        return named | self.speculative()


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
    SIBLING = "sibling"
    THRESHOLDS = "thresholds"


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
LOADED = confident(15, 2, 19, 0.2, schedule=((1, 1, 19), (2, max(BATCHES), 16)))
LOADED_PATH = replace(PATH, schedule=((1, 8, 16), (9, max(BATCHES), 12)))
# The same for the draft VLM, as deep as its longest chain.
VLM_LOADED = confident(11, 3, 19, 0.1, head=DRAFT_VLM, schedule=((1, 1, 19), (2, max(BATCHES), 12)))
VLM_LOADED_PATH = confident(
    11, 1, 12, 0.3, head=DRAFT_VLM, schedule=((1, 8, 12), (9, max(BATCHES), 8))
)
_POLICIES = (
    # K = depth + 1 for every depth below, and 5, which most heads are served with.
    *(Draft(count) for count in (4, 5, 6, 8, 12, 16)),
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
# The head's chain beside a published model of the target's family, drafting as it is.
_SIBLINGS = (
    CHAIN,
    *(Draft(5, head=SIBLING, images=images) for images in (None, "prune:4", "none")),
    Draft(7, head=SIBLING),
    confident(11, 1, 12, 0.3, head=SIBLING),
)
_GREEDY, _SAMPLED = Condition("greedy"), Condition("sampled", temperature=1.0)
_BATCHED = Condition("batched", has_batches=True)
# The same as greedy, in a run of its own: the head's chain takes turns with the sibling's.
_BESIDE = Condition("sibling")
_THRESHOLDS = Condition("thresholds", has_batches=True)
PARTS: Mapping[Part, tuple[Condition, tuple[Draft, ...]]] = MappingProxyType(
    {
        Part.POLICIES: (_GREEDY, _POLICIES),
        Part.NODES: (_GREEDY, (Draft(6), *_SIZES)),
        Part.BATCH: (_BATCHED, (Draft(6), LONG, TREE, LOADED, LOADED_PATH)),
        Part.TEMPERATURE: (_SAMPLED, (CHAIN, TREE, LONG, PATH)),
        Part.DRAFT_VLM: (_GREEDY, _VLM),
        Part.DRAFT_VLM_BATCH: (_BATCHED, (*_VLM_CHAINS[1:], VLM_LOADED, VLM_LOADED_PATH)),
        Part.SIBLING: (_BESIDE, _SIBLINGS),
        Part.THRESHOLDS: (
            _THRESHOLDS,
            tuple(confident(15, 1, 16, threshold) for threshold in (0.1, 0.2, 0.3, 0.5, 0.7)),
        ),
    }
)

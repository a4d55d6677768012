"""The setting ``"tree"`` of the speculative config; imports no PyTorch."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from vllm_vispec.trees.sizes import MAX_DEPTH, MAX_NODES, MAX_SIBLINGS, channels_per_level
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import Settings

Policy = Literal["eagle2", "chain", "spec_llava", "entropy"]
THRESHOLDS: Mapping[str, float] = {"spec_llava": 0.03, "entropy": 0.1}
"""Defaults of ``threshold``; it means nothing to the other policies."""


class TreeSettings(Settings):
    """How a draft tree is grown."""

    policy: Policy = Field(
        default="eagle2", description="Name of the rule, see `policies.POLICIES`."
    )
    depth: int = Field(
        default=3,
        ge=1,
        le=MAX_DEPTH,
        strict=True,
        description="Draft passes after the first; a path has up to depth + 1 draft tokens.",
    )
    top_k: int = Field(
        default=8,
        ge=1,
        le=MAX_SIBLINGS,
        strict=True,
        description="Children that a node may get, and nodes that are expanded in one pass; with 1 "
        "a tree is a single path.",
    )
    threshold: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        strict=True,
        description="Least probability, of the whole path, at which spec_llava keeps a node and "
        "entropy expands one. Default: the policy's.",
    )

    @model_validator(mode="after")
    def _check_threshold(self) -> Self:
        if self.threshold is not None and not self.is_confident:
            raise ViSpecError(
                f"speculative config: tree.threshold means nothing to policy {self.policy!r}; "
                "leave it out"
            )
        return self

    @property
    def width(self) -> int:
        """Nodes expanded in one pass, and children of each."""
        return 1 if self.policy == "chain" else self.top_k

    @property
    def is_confident(self) -> bool:
        """Whether paths end where the draft is unsure, so that even a single one is no chain."""
        return self.policy in THRESHOLDS

    @property
    def least_probability(self) -> float:
        """The threshold, or the policy's default."""
        return THRESHOLDS.get(self.policy, 0.0) if self.threshold is None else self.threshold

    @property
    def levels(self) -> int:
        """Most draft tokens on one path."""
        return self.depth + 1

    @property
    def draft_slots(self) -> int:
        """KV slots that the draft passes behind the root write."""
        return self.depth * self.top_k

    @property
    def num_channels(self) -> int:
        """Head channels that the codes of all paths need."""
        return channels_per_level(self.width) * self.levels

    def one_branch(self) -> Self:
        """Return the rule for trees of a single path."""
        return self.model_copy(update={"top_k": 1})

    def check_nodes(self, num_nodes: Any) -> None:
        """Check ``num_speculative_tokens``: the nodes of a tree, without its root.

        Raises:
            ViSpecError: Names the setting and the remedy.
        """
        candidates = self.top_k + self.depth * self.top_k**2
        least, most = self.levels, min(candidates, MAX_NODES)
        if type(num_nodes) is int and least <= num_nodes <= most:
            return
        allowed = most if least == most else f"an integer between {least} and {most}"
        raise ViSpecError(
            f"speculative config: num_speculative_tokens={num_nodes!r} must be {allowed}: "
            f"with a tree it is the number of nodes, and depth {self.depth} with top_k "
            f"{self.top_k} gives paths of {least} and at most {candidates} nodes"
            + ("" if least == most else "; 29 suits most heads")
        )

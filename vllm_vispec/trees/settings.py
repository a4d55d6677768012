"""The setting ``"tree"`` of the speculative config."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from vllm_vispec.trees.codes import MAX_SIBLINGS
from vllm_vispec.trees.policies import POLICIES
from vllm_vispec.utils.errors import ViSpecError, did_you_mean

MAX_DEPTH = 15
# vLLM's rejection sampler (V1) takes at most 128 draft tokens a request.
MAX_NODES = 127
_PREFIX = "speculative config: tree"


@dataclass(frozen=True)
class TreeSettings:
    """How a draft tree is grown.

    Attributes:
        policy: Name of the rule, see `policies.POLICIES`.
        depth: Draft passes after the first one; the longest path has ``depth + 1`` draft tokens.
        top_k: Children that a node may get, and nodes that are expanded in one pass; with 1 a tree
            is a single path.
        threshold: Least probability, of the whole path, at which ``spec_llava`` keeps a node and
            ``entropy`` expands one; None: the policy's default.

    Raises:
        ViSpecError: Names the key and the remedy.
    """

    policy: str = "eagle2"
    depth: int = 3
    top_k: int = 8
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            hint = did_you_mean(self.policy, POLICIES) or f"; choose one of {', '.join(POLICIES)}"
            raise ViSpecError(f"{_PREFIX}.policy={self.policy!r} is unknown{hint}")
        _check_integer("depth", self.depth, 1, MAX_DEPTH)
        _check_integer("top_k", self.top_k, 1, MAX_SIBLINGS)
        self._check_threshold()

    def _check_threshold(self) -> None:
        if self.threshold is None:
            return
        if not POLICIES[self.policy].takes_threshold:
            raise ViSpecError(
                f"{_PREFIX}.threshold means nothing to policy {self.policy!r}; leave it out"
            )
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float):
            raise ViSpecError(f"{_PREFIX}.threshold={self.threshold!r} must be a number below 1")
        if not 0 <= self.threshold < 1:
            raise ViSpecError(
                f"{_PREFIX}.threshold={self.threshold!r} must lie between 0 and 1; it is the least "
                "probability of a path"
            )

    @property
    def width(self) -> int:
        """Nodes expanded in one pass, and children of each."""
        return 1 if self.policy == "chain" else self.top_k

    @property
    def is_confident(self) -> bool:
        """Whether paths end where the draft is unsure, so that even a single one is no chain."""
        return POLICIES[self.policy].takes_threshold

    @property
    def levels(self) -> int:
        """Most draft tokens on one path."""
        return self.depth + 1

    @property
    def max_nodes(self) -> int:
        """Nodes among which the draft passes can choose."""
        return self.top_k + self.depth * self.top_k**2

    @property
    def draft_slots(self) -> int:
        """KV slots behind a request's last token that its draft passes write."""
        return self.depth * self.top_k

    @classmethod
    def from_config(cls, value: Any) -> "TreeSettings":
        """Read the setting.

        Raises:
            ViSpecError: Names the key and the remedy.
        """
        if not isinstance(value, Mapping):
            raise ViSpecError(
                f'{_PREFIX}={value!r} must be an object such as {{"policy": "eagle2", "depth": 3, '
                '"top_k": 8}'
            )
        known = [field.name for field in fields(cls)]
        unknown = [name for name in value if name not in known]
        if unknown:
            hint = did_you_mean(unknown[0], known) or f"; the keys are {', '.join(known)}"
            raise ViSpecError(f"{_PREFIX}.{unknown[0]} is unknown{hint}")
        return cls(**value)

    def one_branch(self) -> "TreeSettings":
        """Return the rule for trees of a single path."""
        return replace(self, top_k=1)

    def to_config(self) -> dict[str, Any]:
        """Return the setting as plain data."""
        return asdict(self)

    def check_nodes(self, num_nodes: Any) -> None:
        """Check ``num_speculative_tokens``: the nodes of a tree, without its root.

        Raises:
            ViSpecError: Names the setting and the remedy.
        """
        most = min(self.max_nodes, MAX_NODES)
        if isinstance(num_nodes, bool) or not isinstance(num_nodes, int):
            num_nodes = repr(num_nodes)
        elif self.levels <= num_nodes <= most:
            return
        is_path = most == self.levels
        allowed = most if is_path else f"an integer between {self.levels} and {most}"
        raise ViSpecError(
            f"speculative config: num_speculative_tokens={num_nodes} must be {allowed}: "
            f"with a tree it is the number of nodes, and depth {self.depth} with top_k "
            f"{self.top_k} gives paths of {self.levels} and at most {self.max_nodes} nodes"
            + ("" if is_path else "; 29 suits most heads")
        )


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ViSpecError(f"{_PREFIX}.{name}={value!r} must be an integer between {low} and {high}")

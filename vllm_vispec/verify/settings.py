"""What `vispec verify` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_vispec.bench.machine import has_gpu
from vllm_vispec.bench.schema import Record
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.verify.result import CHAIN, PLAIN, TREE

_CHECKPOINTS = Path(__file__).resolve().parents[2] / "examples" / "tiny_vlm" / "checkpoints"
SHIPPED_PAIR = str(_CHECKPOINTS / "target"), str(_CHECKPOINTS / "vispec_head")
TREE_NODES = 29
_OURS = ("model", "speculative_config", "worker_extension_cls", "disable_log_stats")


@dataclass(frozen=True)
class VerifySettings(Record):
    """Which pair is verified, and with which engine options.

    Attributes:
        target, head: folders or hub ids.
        num_speculative_tokens: of the chain.
        tree: the setting of the tree; `tree_nodes` is its number of draft tokens.
        engine: vLLM's engine arguments by their Python names, for all engines.
        speculative_config: further keys for both speculative engines.

    Raises:
        ViSpecError: a value is not for the user to say here, or impossible.
    """

    target: str
    head: str
    num_speculative_tokens: int = 4
    tree: dict[str, Any] = field(default_factory=dict)
    tree_nodes: int = TREE_NODES
    engine: dict[str, Any] = field(default_factory=dict)
    speculative_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        TreeSettings.from_config(self.tree).check_nodes(self.tree_nodes)
        found = next((name for name in _OURS if name in self.engine), None)
        if found is not None:
            raise ViSpecError(
                f"--engine-args: {found} is set by vispec verify itself; leave it out, and see "
                "--target, --head and --speculative-config"
            )
        for name in ("model", "num_speculative_tokens", "tree"):
            if name in self.speculative_config:
                raise ViSpecError(
                    f"--speculative-config: {name} has an option of its own (--head, "
                    "--num-speculative-tokens, --tree); leave it out"
                )

    @property
    def is_shipped_pair(self) -> bool:
        """Whether it is known what the head should accept."""
        return (self.target, self.head) == SHIPPED_PAIR and not self.speculative_config

    def engine_args(self, name: str) -> dict[str, Any]:
        """Return keyword arguments of `vllm.LLM` for the plain, chain or tree engine."""
        args: dict[str, Any] = {"model": self.target, "seed": 0, **self.engine}
        # Compiling a small model for a CPU takes longer than everything that is verified.
        args.setdefault("enforce_eager", not has_gpu())
        if name == PLAIN:
            return args
        config = {"method": "vispec", **self.speculative_config, "model": self.head}
        if name == CHAIN:
            config |= {"num_speculative_tokens": self.num_speculative_tokens}
        else:
            config |= {"num_speculative_tokens": self.tree_nodes, "tree": self.tree}
        return args | {"speculative_config": config}

    def num_draft_passes(self, name: str) -> int:
        """Return how often the draft runs for one step's draft tokens."""
        if name == TREE:
            return TreeSettings.from_config(self.tree).levels
        return self.num_speculative_tokens if name == CHAIN else 0


def choose_pair(target: str | None, head: str | None) -> tuple[str, str]:
    """Return what the user gave, else the pair of examples/tiny_vlm.

    Raises:
        ViSpecError: only one of them is given, or the package is installed without examples.
    """
    if target is not None and head is not None:
        return target, head
    if target is not None or head is not None:
        raise ViSpecError("--target and --head belong together: give both, or neither")
    if not all(Path(folder, "config.json").is_file() for folder in SHIPPED_PAIR):
        raise ViSpecError(
            "the pair of examples/tiny_vlm is not installed here: give --target and --head"
        )
    return SHIPPED_PAIR

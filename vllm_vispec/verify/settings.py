"""What `vispec verify` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_vispec.bench.machine import has_gpu
from vllm_vispec.bench.schema import Record
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.verify.result import CHAIN, PLAIN, TREE

_CHECKPOINTS = Path(__file__).resolve().parents[2] / "examples" / "tiny_vlm" / "checkpoints"
SHIPPED_PAIR = str(_CHECKPOINTS / "target"), str(_CHECKPOINTS / "vispec_head")
_OURS = ("model", "speculative_config", "worker_extension_cls", "disable_log_stats")


@dataclass(frozen=True)
class EngineOptions:
    """Engine arguments of vLLM that have options of their own; the help is vLLM's.

    Attributes:
        tensor_parallel_size: As vLLM's.
        dtype: As vLLM's.
        max_model_len: As vLLM's.
        gpu_memory_utilization: As vLLM's.
        enforce_eager: As vLLM's; default: only without a GPU.
        attention_backend: As vLLM's.
        kv_cache_dtype: As vLLM's.
    """

    tensor_parallel_size: int | None = None
    dtype: str | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    enforce_eager: bool | None = None
    attention_backend: str | None = None
    kv_cache_dtype: str | None = None


@dataclass(frozen=True)
class VerifySettings(Record):
    """Which pair is verified, and with which engine options. First sentences are options' help.

    Attributes:
        target: Target: a folder or hub id; default: the shipped pair's.
        head: Head: a folder or hub id, in any checkpoint format; default as above.
        num_speculative_tokens: Of the chain.
        tree: The tree's setting, e.g. '{"depth": 5}'; JSON.
        tree_nodes: As --num-speculative-tokens, of the tree.
        engine: More of vLLM's engine arguments, e.g. '{"max_num_seqs": 16}'.
        speculative_config: More for both drafts, e.g. '{"draft_vocab": 4096}'.

    Raises:
        ViSpecError: a value is not for the user to say here, or impossible.
    """

    target: str = ""
    head: str = ""
    num_speculative_tokens: int = 4
    tree: dict[str, Any] = field(default_factory=dict)
    tree_nodes: int = 29
    engine: dict[str, Any] = field(default_factory=dict)
    speculative_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from vllm_vispec.trees.settings import TreeSettings

        for name, value in zip(("target", "head"), self._choose_pair(), strict=True):
            object.__setattr__(self, name, value)
        if self.num_speculative_tokens < 1:
            raise ViSpecError(f"-k {self.num_speculative_tokens}: give at least 1")
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

    def _choose_pair(self) -> tuple[str, str]:
        """Return what the user gave, else the pair of examples/tiny_vlm."""
        if self.target and self.head:
            return self.target, self.head
        if self.target or self.head:
            raise ViSpecError("--target and --head belong together: give both, or neither")
        if not all(Path(folder, "config.json").is_file() for folder in SHIPPED_PAIR):
            raise ViSpecError(
                "the pair of examples/tiny_vlm is not installed here: give --target and --head"
            )
        return SHIPPED_PAIR

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
        from vllm_vispec.trees.settings import TreeSettings

        if name == TREE:
            return TreeSettings.from_config(self.tree).levels
        return self.num_speculative_tokens if name == CHAIN else 0

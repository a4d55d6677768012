"""What the examples share: the tiny pair of checkpoints and how to serve it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from examples.tiny_vlm.shipped import (
    CHECKPOINTS,
    DRAFT_TOKENS,
    DRAFTS,
    HEAD,
    MAX_MODEL_LEN,
    TARGET,
)

if TYPE_CHECKING:
    from vllm import LLM


ModelOption = Annotated[str, typer.Option("--model", help="Target: a folder or hub id.")]
DraftOption = Annotated[
    str,
    typer.Option(
        "--draft-model",
        "--draft",
        help=f"{', '.join(DRAFTS)}, or another folder or hub id.",
        callback=lambda given: DRAFTS.get(given, given),
    ),
]
DraftTokensOption = Annotated[
    int, typer.Option("--num-speculative-tokens", min=1, help="Draft tokens per step (K).")
]

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    # An answer should not drown in notices; what goes wrong is raised.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
    "TQDM_DISABLE": "1",
    # Read by vLLM's CPU backend only: cache in GiB, and no claim on all cores.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class PairError(SystemExit):
    """No checkpoint, or no engine; ends the program with one line and status 2."""

    def __init__(self, message: str) -> None:
        typer.echo(f"error: {message}", err=True)
        super().__init__(2)


@dataclass(frozen=True)
class Pair:
    """A target and its draft.

    Raises:
        PairError: A local folder does not exist.
    """

    model: str = TARGET
    draft_model: str = HEAD
    num_speculative_tokens: int = DRAFT_TOKENS

    def __post_init__(self) -> None:
        _check(self.model, "--model")
        _check(self.draft_model, "--draft-model")

    def speculative_config(self) -> dict[str, Any]:
        """Return what goes into vLLM's ``speculative_config``."""
        return {
            "method": "vispec",
            "model": self.draft_model,
            "num_speculative_tokens": self.num_speculative_tokens,
        }

    def llm_kwargs(self) -> dict[str, Any]:
        """Return keyword arguments for ``vllm.LLM``."""
        return {
            "model": self.model,
            "speculative_config": self.speculative_config(),
            "max_model_len": MAX_MODEL_LEN,
            "max_num_batched_tokens": MAX_MODEL_LEN,
            "enforce_eager": not has_gpu(),
        }


def start_llm(pair: Pair, **more: Any) -> LLM:
    """Return the running pair.

    Args:
        more: Further arguments of ``vllm.LLM``.

    Raises:
        PairError: It does not start, with the cause.
    """
    prepare_environment()
    from vllm import LLM

    from vllm_vispec.utils.engine_start import starting_engine
    from vllm_vispec.utils.errors import ViSpecError

    try:
        with starting_engine(pair.model, lambda name, value: f"{name}={value} for vllm.LLM"):
            return LLM(**pair.llm_kwargs(), **more)
    except ViSpecError as error:
        raise PairError(str(error)) from error


def prepare_environment() -> None:
    """Set defaults that suit a small machine; call it before vLLM is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def has_gpu() -> bool:
    """Whether compiling the models, which takes a while, will pay off."""
    import torch

    return bool(torch.cuda.is_available())


def _check(model: str, option: str) -> None:
    is_local = Path(model).is_absolute() or model.startswith(("./", "../", "~"))
    if not is_local or (Path(model).expanduser() / "config.json").is_file():
        return
    remedy = f"give {option} a folder or hub id"
    if Path(model).parent == CHECKPOINTS:
        remedy = f"train the tiny pair (see examples/tiny_vlm/README.md) or {remedy}"
    raise PairError(f"no checkpoint at {model}: {remedy}")

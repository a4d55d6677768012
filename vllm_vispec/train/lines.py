"""Lines of metrics.jsonl."""

from __future__ import annotations

from typing import Any

from vllm_vispec.compressors.spec import CompressorSpec
from vllm_vispec.train.choices import Choices
from vllm_vispec.train.state import Progress
from vllm_vispec.train.trainer import StepResult


def step_line(
    progress: Progress, result: StepResult, lr: float, gate: dict[str, Any]
) -> dict[str, Any]:
    """A step that is done; `gate` as `gate_line` makes it."""
    return {
        "step": progress.step,
        "epoch": progress.epoch,
        "loss": result.loss,
        **{f"loss_{name}": value for name, value in result.parts.items()},
        "accuracy": round(result.accuracy, 5),
        "lr": lr,
        "gradient_norm": result.gradient_norm,
        "rows": result.rows,
        "tokens_per_second": round(result.tokens / result.seconds, 1),
        "seconds": round(progress.seconds, 3),
        **gate,
    }


def gate_line(choices: Choices, spec: CompressorSpec) -> dict[str, Any]:
    """The histogram of a gate's choices; nothing without a gate, or a turn that sees an image."""
    found = choices.to_json(spec)
    return {"gate": found} if found else {}

"""Training runs in processes of their own, ended from inside at a given step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from vllm_vispec.train.config import config_from_flat
from vllm_vispec.train.distributed import processes
from vllm_vispec.train.loop import train
from vllm_vispec.train.trainer import StepResult, Trainer


def run_and_signal(flat: dict[str, Any], at_step: int, signal_name: str) -> dict[str, Any]:
    """Train, and get a signal while step `at_step` (from 1) is computed."""
    original = Trainer.step

    def step(
        self: Trainer, passes: Any, number: int, lr: float, progress: float = 0.0
    ) -> StepResult:
        if number + 1 == at_step:
            os.kill(os.getpid(), getattr(signal, signal_name))
        return original(self, passes, number, lr, progress)

    Trainer.step = step  # type: ignore[method-assign]
    try:
        with processes("cpu") as group:
            outcome = train(config_from_flat(flat), group)
    finally:
        Trainer.step = original  # type: ignore[method-assign]
    return {"finished": outcome.finished, "step": outcome.step, "message": outcome.message}


def losses(output: Path) -> dict[int, float]:
    """Loss of every logged step of a run."""
    import json

    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}

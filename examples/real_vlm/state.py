"""What a training run keeps on the disk: weights, optimizer, step and seconds, in one file."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vllm_vispec.utils.files import sweep, write_text, writing


@dataclass
class Run:
    """A stage of training.

    Args:
        file: Its checkpoint, safetensors; its log lies beside it.
        trained: Parameters by name.
        optimizer: AdamW over them.
        budget: Seconds of processor time of this process and its threads, all sittings together.
            Wall time is longer where others use the machine.
    """

    file: Path
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    budget: float
    step: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        if self.file.is_file():
            self._load()
        self._begun, self._saved = time.process_time() - self.seconds, time.time()

    @property
    def done(self) -> bool:
        """Whether the budget is used up."""
        return self.seconds >= self.budget

    def update(self, warmup: int = 50, floor: float = 0.02) -> float:
        """Clip, step with the scheduled rate (warm-up, then cosine), count; returns the norm."""
        progress = min(1.0, self.seconds / self.budget)
        factor = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor * min(1.0, (self.step + 1) / warmup)
        norm = float(nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds = time.process_time() - self._begun
        return norm

    def save_sometimes(self, every: float = 300.0) -> bool:
        """Save every few minutes; returns whether it did."""
        due = time.time() - self._saved > every
        if due:
            self.save()
            self._saved = time.time()
        return due

    def save(self) -> None:
        """Write the checkpoint, whole or not at all, then the log."""
        sweep(self.file.parent)
        tensors = {name: value.detach() for name, value in self.trained.items()}
        for name, value in self.trained.items():
            for key, state in self.optimizer.state[value].items():
                tensors[f"{key}/{name}"] = state
        about = {"run": json.dumps({"step": self.step, "seconds": self.seconds, "log": self.log})}
        from safetensors.torch import save_file

        with writing(self.file) as aside:
            save_file(tensors, aside, metadata=about)
        write_text(self.file.with_suffix(".jsonl"), "".join(json.dumps(x) + "\n" for x in self.log))

    def _load(self) -> None:
        with safe_open(self.file, "pt") as stored:
            about = json.loads(stored.metadata()["run"])
            self.step, self.seconds, self.log = about["step"], about["seconds"], about["log"]
            keys: dict[str, dict[str, Tensor]] = {name: {} for name in self.trained}
            for key in stored.keys():  # noqa: SIM118
                kind, _, name = key.rpartition("/")
                if kind:
                    keys[name][kind] = stored.get_tensor(key)
                else:
                    self.trained[name].data.copy_(stored.get_tensor(key))
        for name, value in self.trained.items():
            self.optimizer.state[value].update(keys[name])

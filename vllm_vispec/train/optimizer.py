"""The optimizer: AdamW, how gradients are clipped, the learning rate, and how long a run is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_vispec.train.config import OptimizerConfig, ScheduleConfig
from vllm_vispec.train.distributed import Processes, whole

# Share of the rate that is left after a share x of the decay.
SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "constant": lambda x: 1.0,
}


def rate_factor(settings: ScheduleConfig, progress: float) -> float:
    """Return the learning rate as a share of its peak.

    Args:
        progress: share of the run that is over when the step is done, 0 to 1.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < settings.warmup:
        return progress / settings.warmup
    left = 1 - settings.warmup
    over = (progress - settings.warmup) / left if left else 1.0
    return settings.floor + (1 - settings.floor) * SHAPES[settings.decay](over)


@dataclass(frozen=True)
class Plan:
    """The length of a run.

    Attributes:
        steps_per_epoch: optimizer steps per pass over the data.
        total_steps: steps after which it ends, None without such a limit.
        total_seconds: training time after which it ends, None without such a limit.
    """

    steps_per_epoch: int
    total_steps: int | None
    total_seconds: float | None

    @classmethod
    def from_settings(cls, settings: ScheduleConfig, steps_per_epoch: int) -> Plan:
        """Return the plan of a schedule for data of a known size."""
        limits = [settings.max_steps] if settings.max_steps else []
        if settings.epochs:
            limits.append(max(1, round(settings.epochs * steps_per_epoch)))
        return cls(steps_per_epoch, min(limits, default=None), settings.minutes * 60 or None)

    def progress(self, steps: int, seconds: float) -> float:
        """Return the share of the run that is over after this many steps and seconds."""
        shares = [0.0]
        if self.total_steps is not None:
            shares.append(steps / self.total_steps)
        if self.total_seconds is not None:
            shares.append(seconds / self.total_seconds)
        return min(max(shares), 1.0)

    def is_over(self, steps: int, seconds: float) -> bool:
        """Return whether a limit is reached."""
        return self.progress(steps, seconds) >= 1.0


def _clip_values(gradients: list[Tensor], limit: float) -> None:
    for gradient in gradients:
        gradient.clamp_(-limit, limit)


def _clip_norm(gradients: list[Tensor], limit: float) -> None:
    factor = limit / (total_norm(gradients) + 1e-6)
    if factor < 1:
        for gradient in gradients:
            gradient.mul_(factor)


CLIPS: Mapping[str, Callable[[list[Tensor], float], None]] = {
    "value": _clip_values,
    "norm": _clip_norm,
    "none": lambda gradients, limit: None,
}


def total_norm(gradients: Iterable[Tensor]) -> float:
    """Return the Euclidean norm over all gradients, sharded or not."""
    return float(whole(nn.utils.get_total_norm(list(gradients))).item())


def make_optimizer(
    settings: OptimizerConfig, weights: Iterable[nn.Parameter], group: Processes
) -> torch.optim.AdamW:
    """Return AdamW over the trained weights."""
    return torch.optim.AdamW(
        list(weights),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=group.world == 1 or group.device.type == "cuda",
    )

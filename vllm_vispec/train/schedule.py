"""The learning rate, as a function of how much of the run is over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllm_vispec.train.config import ScheduleConfig

# What is left of the rate when a share x of the decay is over.
SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "constant": lambda x: 1.0,
}


def rate_factor(settings: ScheduleConfig, progress: float) -> float:
    """Learning rate as a share of its peak.

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
    """How long a run is.

    Attributes:
        steps_per_epoch: optimizer steps per pass over the data.
        total_steps: steps after which it ends, None without such a limit.
        total_seconds: training time after which it ends, None without such a limit.
    """

    steps_per_epoch: int
    total_steps: int | None
    total_seconds: float | None

    @classmethod
    def of(cls, settings: ScheduleConfig, steps_per_epoch: int) -> Plan:
        """The plan of a schedule for data of a known size."""
        limits = [settings.max_steps] if settings.max_steps else []
        if settings.epochs:
            limits.append(max(1, round(settings.epochs * steps_per_epoch)))
        return cls(steps_per_epoch, min(limits, default=None), settings.minutes * 60 or None)

    def progress(self, steps: int, seconds: float) -> float:
        """Share of the run that is over after so many steps and seconds."""
        shares = [0.0]
        if self.total_steps is not None:
            shares.append(steps / self.total_steps)
        if self.total_seconds is not None:
            shares.append(seconds / self.total_seconds)
        return min(max(shares), 1.0)

    def is_over(self, steps: int, seconds: float) -> bool:
        """Whether a limit is reached."""
        return self.progress(steps, seconds) >= 1.0

"""What one forward pass of training draws at random, and from where.

Sources follow from the run's seed, the step, the pass and the process: a resumed run draws the
same.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch


@dataclass(frozen=True)
class Draws:
    """Sources of chance; None: nothing is drawn.

    Attributes:
        noise: of the noise on the target's states.
        gate: of the Gumbel noise on a gate's logits.
        temperature: of the softmax that the gate's gradients go through.
    """

    noise: torch.Generator | None = None
    gate: torch.Generator | None = None
    temperature: float = 1.0


NOTHING = Draws()


def source(
    purpose: str, seed: int, step: int, index: int, rank: int, device: torch.device
) -> torch.Generator:
    """A generator of its own for a purpose in a forward pass."""
    name = f"{purpose} {seed} {step} {index} {rank}"
    return torch.Generator(device).manual_seed(Random(name).getrandbits(62))

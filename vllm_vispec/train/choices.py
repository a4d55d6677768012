"""How often a gate chose each branch: the histogram of a run's log.

Tensor names end in their shape: K branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vllm_vispec.compressors.gate import GateOutput
from vllm_vispec.compressors.spec import CompressorSpec


@dataclass(frozen=True)
class Choices:
    """Sums over turns that see an image.

    Attributes:
        chosen: turns whose first choice each branch was (in training with its noise).
        share: what the gate gave each branch, its softmax without noise, added up.
    """

    chosen: tuple[float, ...] = ()
    share: tuple[float, ...] = ()

    def __add__(self, other: Choices) -> Choices:
        if not (self.chosen and other.chosen):
            return self if self.chosen else other
        return Choices(_add(self.chosen, other.chosen), _add(self.share, other.share))

    def to_json(self, spec: CompressorSpec) -> dict[str, Any]:
        """Shares by branch of `spec`; nothing without a gate or a turn."""
        turns = sum(self.chosen)
        if not turns:
            return {}
        names = [str(branch) for branch in spec.primitives]
        return {
            "turns": int(turns),
            "chosen": _by_name(names, self.chosen, turns),
            "share": _by_name(names, self.share, turns),
        }

    def line(self, spec: CompressorSpec) -> str:
        """The choices in words for a user: "prune:20 0.41, pool:20 0.59"."""
        chosen = self.to_json(spec).get("chosen", {})
        return ", ".join(f"{name} {share:.2f}" for name, share in chosen.items())


def count_choices(output: GateOutput) -> Tensor:
    """Sums over turns, float32 [2 K]: those of `Choices.chosen`, then those of its `share`."""
    chosen_K = F.one_hot(output.choice_G, output.share_GK.shape[-1]).sum(0)
    share_K = output.share_GK.detach().sum(0)
    return F.pad(share_K, (len(chosen_K), 0)) + F.pad(chosen_K, (0, len(share_K)))


def to_choices(sums: Sequence[float]) -> Choices:
    """`count_choices`, perhaps added up, as `Choices`."""
    half = len(sums) // 2
    return Choices(tuple(sums[:half]), tuple(sums[half:]))


def _add(one: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _by_name(names: Sequence[str], sums: Sequence[float], turns: float) -> dict[str, float]:
    """Shares; those of branches that are written alike add up."""
    found: dict[str, float] = {}
    for name, value in zip(names, sums, strict=True):
        found[name] = found.get(name, 0.0) + value / turns
    return {name: round(share, 4) for name, share in found.items()}

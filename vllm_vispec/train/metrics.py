"""What validation and evaluation measure: accepted draft tokens, and a gate's decisions.

Tensor names end in their shape: K branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_vispec.compressors.gate import GateOutput
from vllm_vispec.compressors.spec import CompressorSpec


@dataclass(frozen=True)
class Acceptance:
    """Sums over the steps (draft and verify) of some answers.

    Attributes:
        steps: verification steps.
        tokens: answer tokens that steps produced. The first token of an answer comes out of the
            prefill and does not count. A step whose drafts reach the end of the answer has no
            bonus token, so this may be less than accepted + steps.
        accepted_by_position: steps that accepted the draft token at each position (K of them).
        answers: answers (one per assistant turn).
    """

    steps: int
    tokens: int
    accepted_by_position: tuple[int, ...]
    answers: int = 0

    @classmethod
    def of_answer(
        cls, accepted: Sequence[int], num_tokens: int, num_draft_tokens: int
    ) -> Acceptance:
        """Count one answer.

        Args:
            accepted: accepted draft tokens of every step, in order.
            num_tokens: tokens of the answer, its first and its last included.
            num_draft_tokens: K.
        """
        by_position = tuple(
            sum(count > position for count in accepted) for position in range(num_draft_tokens)
        )
        return cls(len(accepted), max(num_tokens - 1, 0), by_position, 1)

    @classmethod
    def nothing(cls, num_draft_tokens: int) -> Acceptance:
        """No answer yet."""
        return cls(0, 0, (0,) * num_draft_tokens)

    @property
    def mean_accepted_tokens(self) -> float:
        """Accepted draft tokens per step, 0 without steps."""
        return sum(self.accepted_by_position) / max(self.steps, 1)

    @property
    def acceptance_length(self) -> float:
        """Accepted draft tokens per step plus the bonus token, as vLLM counts; 1 without steps."""
        return self.mean_accepted_tokens + 1

    @property
    def acceptance_rates(self) -> tuple[float, ...]:
        """Share of steps that accepted the draft token at each position."""
        return tuple(count / max(self.steps, 1) for count in self.accepted_by_position)

    def merge(self, other: Acceptance) -> Acceptance:
        """Sums of both; the shorter chain counts as having accepted nothing further on."""
        return Acceptance(
            self.steps + other.steps,
            self.tokens + other.tokens,
            tuple(
                map(
                    sum,
                    zip_longest(self.accepted_by_position, other.accepted_by_position, fillvalue=0),
                )
            ),
            self.answers + other.answers,
        )

    def to_json(self) -> dict[str, Any]:
        """Sums and rates as plain data."""
        return {
            "answers": self.answers,
            "rounds": self.steps,
            "tokens": self.tokens,
            "acceptance_length": round(self.acceptance_length, 4),
            "mean_accepted_tokens": round(self.mean_accepted_tokens, 4),
            "accept_rates": [round(rate, 4) for rate in self.acceptance_rates],
            "accepted_by_position": list(self.accepted_by_position),
        }


Families = dict[str, Acceptance]
"""Acceptance by task family, and `OVERALL`."""
OVERALL = "overall"


def by_family(family: str, one: Acceptance) -> Families:
    """An answer's acceptance under its family, if it has one, and overall."""
    return {OVERALL: one} | ({family: one} if family else {})


def merge_families(*parts: Families) -> Families:
    """Merge family by family; "overall" comes last."""
    merged: Families = {}
    for part in parts:
        for name, acceptance in part.items():
            merged[name] = merged[name].merge(acceptance) if name in merged else acceptance
    return dict(sorted(merged.items(), key=lambda item: (item[0] == OVERALL, item[0])))


@dataclass(frozen=True)
class GateDecisions:
    """How often a gate chose each branch: sums over turns that see an image.

    Attributes:
        chosen: turns in which each branch was the first choice (in training with its noise).
        share: sums of the gate's softmax without noise.
    """

    chosen: tuple[float, ...] = ()
    share: tuple[float, ...] = ()

    @classmethod
    def from_sums(cls, sums: Sequence[float]) -> GateDecisions:
        """Read what `sum_decisions` returns, perhaps added up."""
        half = len(sums) // 2
        return cls(tuple(sums[:half]), tuple(sums[half:]))

    def __add__(self, other: GateDecisions) -> GateDecisions:
        return GateDecisions(
            tuple(map(sum, zip_longest(self.chosen, other.chosen, fillvalue=0.0))),
            tuple(map(sum, zip_longest(self.share, other.share, fillvalue=0.0))),
        )

    def to_json(self, spec: CompressorSpec) -> dict[str, Any]:
        """Shares by branch of `spec`; nothing without a gate or a turn."""
        turns = sum(self.chosen)
        if not turns:
            return {}
        return {
            "turns": int(turns),
            "chosen": _shares(spec, self.chosen, turns),
            "share": _shares(spec, self.share, turns),
        }

    def describe(self, spec: CompressorSpec) -> str:
        """The decisions for a user: "prune:20 0.41, pool:20 0.59"."""
        chosen = self.to_json(spec).get("chosen", {})
        return ", ".join(f"{name} {share:.2f}" for name, share in chosen.items())


def sum_decisions(output: GateOutput) -> Tensor:
    """Sums over turns, float32 [2 K]: first `GateDecisions.chosen`, then its `share`."""
    chosen_K = F.one_hot(output.choice_G, output.share_GK.shape[-1]).sum(0)
    return torch.cat((chosen_K.to(output.share_GK), output.share_GK.detach().sum(0)))


def _shares(spec: CompressorSpec, sums: Sequence[float], turns: float) -> dict[str, float]:
    """Shares; those of branches that are written alike add up."""
    found: dict[str, float] = {}
    for branch, value in zip(spec.primitives, sums, strict=True):
        found[str(branch)] = found.get(str(branch), 0.0) + value / turns
    return {name: round(share, 4) for name, share in found.items()}

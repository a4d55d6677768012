"""What an evaluation found: as JSON and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_vispec.data.types import Rejected
from vllm_vispec.evaluate.engine import EngineResult
from vllm_vispec.evaluate.options import EvalOptions
from vllm_vispec.spec_decode.low_acceptance import LOW, low_acceptance
from vllm_vispec.train.acceptance import OVERALL, Families

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Report:
    """Result of an evaluation.

    Attributes:
        options: what was evaluated.
        samples: conversations that were evaluated.
        rejected: records that were left out, with the reason.
        simulated: acceptance by family and "overall".
        greedy_share: of answer tokens, the target's argmax; None if not checked.
        engine: what the engine measured; None if it was not asked.
        warning: why target and head may not fit; None if they do.
        break_even: acceptance length from which on drafting saves more than it costs, estimated.
    """

    options: EvalOptions
    samples: int
    rejected: tuple[Rejected, ...]
    simulated: Families
    greedy_share: float | None = None
    engine: EngineResult | None = None
    warning: str | None = None
    break_even: float = LOW

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        content: dict[str, Any] = {
            **self.options.summary(),
            "samples": self.samples,
            "rejected": [{"id": item.sample_id, "reason": item.reason} for item in self.rejected],
            "simulated": {name: one.to_json() for name, one in self.simulated.items()},
        }
        if self.greedy_share is not None:
            content["greedy_share"] = round(self.greedy_share, 6)
        if self.engine is not None:
            content["engine"] = {
                "families": {name: one.to_json() for name, one in self.engine.families.items()},
                "answers_identical_to_data": self.engine.identical,
                "accepted_past_end": self.engine.accepted_past_end,
            }
        return content

    def notes(self) -> list[str]:
        """Lines below the table."""
        plural = "s" * (self.samples != 1)
        lines = [f"{self.samples} conversation{plural} evaluated, {len(self.rejected)} left out"]
        lines += [f"  left out {item.sample_id}: {item.reason}" for item in self.rejected[:5]]
        if self.warning is not None:
            lines.append(f"warning: {self.warning}")
        if self.greedy_share is not None:
            lines.append(
                f"{self.greedy_share:.2%} of the answer tokens are the target's greedy choice"
            )
        if self.engine is not None:
            answers = self.simulated[OVERALL].answers
            lines.append(
                f"engine: {self.engine.identical} of {answers} answers equal the data; "
                f"{self.engine.accepted_past_end} accepted drafts beyond their ends not counted"
            )
        counted = self.simulated if self.engine is None else self.engine.families
        low = low_acceptance(counted[OVERALL].acceptance_length, self.break_even)
        return lines + ([f"warning: {low}"] if low else [])


def make_table(report: Report) -> Table:
    """One line per family, simulated and engine in turn."""
    from rich.table import Table

    depth = len(report.simulated[OVERALL].accepted_by_position)
    table = Table(title="Accepted drafts of greedy chains")
    for name in ("family", "source"):
        table.add_column(name)
    for name in ("answers", "steps", "acceptance_length", *map(str, range(1, depth + 1))):
        table.add_column(name, justify="right")
    sources = [("simulated", report.simulated)]
    if report.engine is not None:
        sources.append(("engine", report.engine.families))
    for family in report.simulated:
        for source, families in sources:
            one = families[family]
            rates = [f"{rate:.0%}" for rate in one.acceptance_rates]
            counts = (str(one.answers), str(one.steps), f"{one.acceptance_length:.3f}")
            table.add_row(family if source == "simulated" else "", source, *counts, *rates)
    return table

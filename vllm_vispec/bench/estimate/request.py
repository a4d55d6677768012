"""`vispec bench estimate`: from a user's settings to a table of estimates."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_vispec.bench.estimate.devices import (
    BANDWIDTH_SHARE,
    COMPUTE_SHARE,
    PASS_OVERHEAD_S,
    get_device,
)
from vllm_vispec.bench.estimate.roofline import (
    Acceptance,
    Hardware,
    PassShape,
    Prediction,
    Workload,
    predict,
)
from vllm_vispec.bench.estimate.schedule import Schedule, best_schedule
from vllm_vispec.bench.estimate.shapes import DecoderSizes, draft_shape, target_shape
from vllm_vispec.errors import ViSpecError

NOTE = "estimate: a roofline calculation, not a measurement"


@dataclass(frozen=True)
class EstimateOptions:
    """What to estimate.

    Attributes:
        target, head: folders with config.json, or shapes (see `explicit_shape`). A head's folder
            needs a target's folder, whose lm_head it uses.
        device: a name in `DEVICES`; None: `bandwidth_gbs` and `tflops` are given.
        bandwidth_gbs, tflops: GB/s and TFLOP/s as reached, instead of a device's public ones.
        dtype: overrides the one in config.json.
        bandwidth_share, compute_share: share of a device's public rates that is reached.
        pass_overhead_ms: of every pass.
        acceptance: share of rounds that accept each position; None: `acceptance_rate` is given.
        acceptance_rate: the same probability at every position, given the one before.
        num_speculative_tokens: every K to estimate.
        batch_sizes: every number of sequences decoded at once.
        context, draft_context: see `Workload`.
        draft_vocab: rows of a smaller draft lm_head.

    Raises:
        ViSpecError: settings are missing or exclude each other.
    """

    target: Path | PassShape
    head: Path | PassShape
    device: str | None = None
    bandwidth_gbs: float | None = None
    tflops: float | None = None
    dtype: str | None = None
    bandwidth_share: float = BANDWIDTH_SHARE
    compute_share: float = COMPUTE_SHARE
    pass_overhead_ms: float = PASS_OVERHEAD_S * 1000
    acceptance: tuple[float, ...] | None = None
    acceptance_rate: float | None = None
    num_speculative_tokens: tuple[int, ...] = (1, 2, 3, 4, 5)
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    context: float = 1024.0
    draft_context: float | None = None
    draft_vocab: int | None = None

    def __post_init__(self) -> None:
        rates = (self.bandwidth_gbs, self.tflops)
        if (self.device is None) != (None not in rates) or (self.device and any(rates)):
            raise ViSpecError("give either --device, or both --bandwidth-gbs and --tflops")
        if (self.acceptance is None) == (self.acceptance_rate is None):
            raise ViSpecError("give either --acceptance (per position) or --acceptance-rate")
        if not self.num_speculative_tokens or not self.batch_sizes:
            raise ViSpecError("give at least one -k and one --batch-size")
        if isinstance(self.head, Path) and not isinstance(self.target, Path):
            raise ViSpecError(
                "--head is a folder, the target is given by numbers: give --target as a folder, or "
                "the head by numbers"
            )

    def hardware(self) -> Hardware:
        """Return the rates to calculate with."""
        overhead = self.pass_overhead_ms / 1000
        if self.bandwidth_gbs is not None and self.tflops is not None:
            return Hardware(self.bandwidth_gbs * 1e9, self.tflops * 1e12, overhead)
        return get_device(str(self.device)).hardware(
            self._dtype(),
            bandwidth_share=self.bandwidth_share,
            compute_share=self.compute_share,
            pass_overhead_s=overhead,
        )

    def _dtype(self) -> str:
        """The one asked for, else the target's, else bfloat16."""
        if self.dtype is None and isinstance(self.target, Path):
            return DecoderSizes.read(self.target, "target").dtype
        return self.dtype or "bfloat16"

    def shapes(self) -> tuple[PassShape, PassShape]:
        """Return those of target and draft."""
        target = self.target
        shape = target_shape(target, self.dtype) if isinstance(target, Path) else target
        if isinstance(self.head, PassShape) or not isinstance(target, Path):
            assert isinstance(self.head, PassShape)  # __post_init__ refuses the rest
            return shape, self.head
        return shape, draft_shape(self.head, target, self.dtype, self.draft_vocab)

    def accepted(self) -> Acceptance:
        """Return the acceptance at every position that some K needs."""
        if self.acceptance is not None:
            return Acceptance(self.acceptance)
        assert self.acceptance_rate is not None  # __post_init__ refuses the rest
        return Acceptance.constant(self.acceptance_rate, max(self.num_speculative_tokens))

    def assumptions(self) -> tuple[str, ...]:
        """Return what the numbers rest on, a line each."""
        rates = "bandwidth and peak as given"
        if self.device is not None:
            device = get_device(self.device)
            rates = (
                f"{self.bandwidth_share:.0%} of {device.bandwidth / 1e12:.3g} TB/s and "
                f"{self.compute_share:.0%} of the dense peak are reached; public figures: "
                f"{device.source}"
            )
        return (
            rates,
            f"{self.pass_overhead_ms:g} ms of every pass are overhead",
            f"{self.context:g} tokens of context per sequence; acceptance is an input here and "
            "holds for the data it was measured on",
            "left out: tensor parallelism, activations, sampling, prefills that share a step",
        )


@dataclass(frozen=True)
class Row:
    """An estimate, and what it becomes without overhead and with twice as much."""

    prediction: Prediction
    without_overhead: float
    with_twice: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        ends = {"without": self.without_overhead, "twice": self.with_twice}
        return {**self.prediction.to_json(), "decode_speedup_by_overhead": ends}


@dataclass(frozen=True)
class EstimateTable:
    """Estimates for every batch size and K.

    Attributes:
        rows: batch sizes outside, K inside.
        assumptions: what they rest on.
    """

    hardware: Hardware
    target: PassShape
    draft: PassShape
    rows: tuple[Row, ...]
    assumptions: tuple[str, ...]

    def schedule(self) -> Schedule:
        """Return the best K by batch size, as `num_speculative_tokens_per_batch_size` takes it."""
        speedups: dict[int, dict[int, float]] = defaultdict(dict)
        for row in self.rows:
            one = row.prediction
            speedups[one.batch][one.num_speculative_tokens] = one.decode_speedup
        return best_schedule(speedups)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "kind": "estimate",
            "note": NOTE,
            "assumptions": list(self.assumptions),
            "hardware": asdict(self.hardware),
            "target": asdict(self.target),
            "draft": asdict(self.draft),
            "num_speculative_tokens_per_batch_size": [list(entry) for entry in self.schedule()],
            "rows": [row.to_json() for row in self.rows],
        }

    def to_markdown(self) -> str:
        """Return the table, the assumptions below it."""
        lines = [
            f"**{NOTE}**",
            "",
            "| batch | K | tokens_per_round | decode_speedup (estimate) | without / with twice the "
            "overhead | plain pass, ms | verify, ms | draft first, step, ms | limits |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_markdown_row(row) for row in self.rows),
            "",
            *(f"- {line}" for line in self.assumptions),
            '- best K by batch size (estimate): `"num_speculative_tokens_per_batch_size": '
            f"{[list(entry) for entry in self.schedule()]}`",
        ]
        return "\n".join(lines) + "\n"


def estimate(options: EstimateOptions) -> EstimateTable:
    """Estimate every batch size and K.

    Raises:
        ViSpecError: a setting or a config.json cannot be used.
    """
    target, draft = options.shapes()
    hardware, accepted = options.hardware(), options.accepted()
    overhead = hardware.pass_overhead_s
    variants = [replace(hardware, pass_overhead_s=factor * overhead) for factor in (1, 0, 2)]
    rows = []
    for batch in options.batch_sizes:
        work = Workload(batch, options.context, options.draft_context)
        for k in options.num_speculative_tokens:
            mid, low, high = (predict(target, draft, one, work, accepted, k) for one in variants)
            rows.append(Row(mid, low.decode_speedup, high.decode_speedup))
    return EstimateTable(hardware, target, draft, tuple(rows), options.assumptions())


def _markdown_row(row: Row) -> str:
    one = row.prediction
    cells = (
        one.batch,
        one.num_speculative_tokens,
        f"{one.tokens_per_round:.2f}",
        f"{one.decode_speedup:.2f}",
        f"{row.without_overhead:.2f} / {row.with_twice:.2f}",
        f"{1000 * one.plain_s:.2f}",
        f"{1000 * one.verify_s:.2f}",
        f"{1000 * one.draft_first_s:.2f}, {1000 * one.draft_step_s:.2f}",
        f"plain {one.plain_bound}, verify {one.verify_bound}, draft {one.draft_bound}",
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"

"""Made-up runs whose speedups are given, for choosing among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tests.bench.made_up_runs import TOKENS, cell
from vllm_vispec.bench.schema import BenchRun, CellKey, CellResult, Request

Speeds = Mapping[int, Mapping[int, float]]
PLAIN_S = 0.1


def run_with(
    speeds: Speeds,
    variant: str = "vispec",
    noise: float = 0.001,
    conditions: Sequence[tuple[float, int]] = ((0.0, -1),),
) -> BenchRun:
    """Return a run of plain and one variant.

    Args:
        speeds: concurrency -> K -> decode_speedup of the variant.
        noise: share by which times of the variant differ between samples and repetitions.
        conditions: (temperature, image tokens) that were measured.
    """
    cells = [
        _cell(CellKey(name, load, k, temperature, images, "tiny suite"), repetition, gain, noise)
        for repetition in range(3)
        for load, by_k in speeds.items()
        for k, gain in by_k.items()
        for temperature, images in conditions
        for name in ("plain", variant)
    ]
    settings = {"head": "some/head", "target": "some/target", "variants": ["plain", variant]}
    return BenchRun(1, {"processor": "Some CPU"}, settings, tuple(cells))


def _cell(key: CellKey, repetition: int, gain: float, noise: float) -> CellResult:
    made = cell(replace(key, variant="plain", concurrency=1), repetition)
    speed, jitter = (1.0, 0.0) if key.variant == "plain" else (gain, noise)
    requests = tuple(
        _timed(request, speed * (1 + jitter * (-1) ** (repetition + number)))
        for number, request in enumerate(made.requests)
    )
    return replace(made, key=key, requests=requests)


def _timed(request: Request, speed: float) -> Request:
    seconds = PLAIN_S * (TOKENS - 1) / speed
    return replace(request, e2e_s=request.ttft_s + seconds)

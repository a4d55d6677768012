"""A small benchmark for every change: it judges outputs and acceptance, never time."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.metrics import BASELINE, Value, baseline_key, by_key, measure
from vllm_vispec.bench.schema import BenchRun

SERVE_ARGS = ("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager")
FLOORS = {"answered": 1.0, "identical_outputs": 1.0, "acceptance_length": 3.5}
"""What every cell has to reach, measured on the shipped pair with a margin."""


def judge(run: BenchRun, settings: MatrixSettings) -> Iterator[tuple[bool, str]]:
    """Yield whether each number of each cell reaches its floor, with a line for the user.

    A cell that is missing reaches none.
    """
    groups = by_key(run.cells)
    for key in (key for _, repetitions in settings.groups() for key, _ in repetitions):
        cells, baseline = groups.get(key, ()), groups.get(baseline_key(key), ())
        failed = measure("failed_requests", cells)
        found: dict[str, Value] = {"answered": 1 - failed if isinstance(failed, float) else None}
        if key.variant != BASELINE:
            for name in ("identical_outputs", "acceptance_length"):
                found[name] = measure(name, cells, baseline)
        for name, value in found.items():
            number = value if isinstance(value, float) else None
            ok = number is not None and number >= FLOORS[name]
            shown = "not measured" if number is None else f"{number:.3f}"
            yield (
                ok,
                f"{'ok  ' if ok else 'FAIL'} {key.variant}, concurrency {key.concurrency}: "
                f"{name} {shown}, floor {FLOORS[name]:g}",
            )

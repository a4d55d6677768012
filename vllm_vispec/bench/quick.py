"""A small benchmark for every change: it judges outputs and acceptance, never time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.metrics import BASELINE, Value, baseline_key, by_key, measure
from vllm_vispec.bench.schema import BenchRun, CellKey

CONCURRENCY = (1, 4)
SAMPLES = 12
MAX_TOKENS = 64
SERVE_ARGS = ("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager")
VARIANTS = ("plain", "vispec")


@dataclass(frozen=True)
class Floors:
    """What every cell has to reach, measured on the shipped pair with a margin.

    Attributes:
        identical_outputs: share of answers equal to plain vLLM's.
        acceptance_length: of the variant that speculates.
        answered: share of requests that got an answer.
    """

    identical_outputs: float = 1.0
    acceptance_length: float = 3.5
    answered: float = 1.0


@dataclass(frozen=True)
class Finding:
    """A number of one cell beside its floor."""

    key: CellKey
    name: str
    value: float | None
    floor: float

    @property
    def ok(self) -> bool:
        """Whether it was measured and is high enough."""
        return self.value is not None and self.value >= self.floor

    def __str__(self) -> str:
        """One line for the user."""
        value = "not measured" if self.value is None else f"{self.value:.3f}"
        mark = "ok  " if self.ok else "FAIL"
        place = f"{self.key.side}, concurrency {self.key.concurrency}"
        return f"{mark} {place}: {self.name} {value}, floor {self.floor:g}"


def quick_settings(
    target: str, head: str, dataset: str, num_tokens: int, serve_args: Sequence[str] = SERVE_ARGS
) -> MatrixSettings:
    """Return the small matrix: plain and ViSpec, greedy, one repetition.

    Raises:
        ViSpecError: see `MatrixSettings`.
    """
    return MatrixSettings(
        target=target,
        dataset=dataset,
        head=head,
        sides=VARIANTS,
        concurrency=CONCURRENCY,
        num_speculative_tokens=(num_tokens,),
        repetitions=1,
        # Nothing depends on time here.
        warm_up=0,
        serve_args=tuple(serve_args),
    )


def judge(run: BenchRun, settings: MatrixSettings, floors: Floors) -> list[Finding]:
    """Return every number that has a floor; a cell that is missing has none."""
    groups, findings = by_key(run.cells), list[Finding]()
    for key in (key for _, repetitions in settings.groups() for key, _ in repetitions):
        cells, baseline = groups.get(key, ()), groups.get(baseline_key(key), ())
        failed = _number(measure("failed_requests", cells)) if cells else None
        answered = None if failed is None else 1.0 - failed
        findings.append(Finding(key, "answered", answered, floors.answered))
        if key.side != BASELINE:
            for name in ("identical_outputs", "acceptance_length"):
                value = _number(measure(name, cells, baseline))
                findings.append(Finding(key, name, value, getattr(floors, name)))
    return findings


def _number(value: Value) -> float | None:
    return value if isinstance(value, int | float) else None

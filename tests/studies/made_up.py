"""Made-up calls of engines, and studies whose heads have been asked already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.calls import Call, Measured
from benchmarks.study import Study, Trained, Variant
from examples.tiny_vlm.families import FAMILIES
from vllm_vispec.utils.files import write_json


def made_up_call(
    accepted: int, seconds: float = 2.0, families: Sequence[str] = ("captioning",)
) -> Call:
    """Two steps for every sample; plain vLLM takes 12 s for 12 tokens."""
    count = len(families)
    return Call(
        families=tuple(families),
        accepted=((accepted, accepted),) * count,
        decoded=(12,) * count,
        plain_decoded=(12,) * count,
        identical=(True,) * count,
        seconds=seconds,
        plain_seconds=12.0,
    )


def one_of_each(accepted: int, seconds: float = 6.0) -> list[Call]:
    """A call about every family, twice as fast as plain vLLM."""
    return [made_up_call(accepted, seconds, (family,)) for family in FAMILIES]


def make_study(root: Path, variants: Sequence[Variant], seeds: tuple[int, ...] = (0,)) -> Study:
    """A study of these variants."""
    return Study(root, "target", tuple(variants), seeds, 32, 7, 4)


def write_calls(
    study: Study, kind: str, variant: Variant, epochs: int, seed: int, calls: Sequence[Call]
) -> None:
    """Write what was found about a head."""
    file = study.result(kind, Trained(variant, epochs, seed))
    write_json(file, Measured(tuple(calls)).to_json())

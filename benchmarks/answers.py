"""What the engine does with the heads of a study, and the rows of the study's JSON.

Engines with heads and one without stay up side by side and answer the questions in turns, one at a
time and greedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.calls import (
    Call,
    Seeds,
    acceptance_length,
    decode_speedup,
    estimate,
    identical,
    ratio,
)
from benchmarks.study import NUM_DRAFT_TOKENS, Study, Trained, Variant
from benchmarks.turns import Job, measure, read_measured
from examples.tiny_vlm.families import FAMILIES
from examples.tiny_vlm.questions import IMAGE_FAMILIES

CELLS, IMAGES = "cells", "image tasks"
GROUPS: Mapping[str, tuple[str, ...]] = {
    IMAGES: IMAGE_FAMILIES,
    **{name: (name,) for name in FAMILIES},
}
Found = Mapping[tuple[str, int], Seeds]
"""Calls by variant and epochs."""


def ask_all(study: Study) -> None:
    """Ask the engine about every head that has no result yet.

    Raises:
        ViSpecError: An engine failed.
    """
    jobs = {}
    for trained in study.heads():
        head = study.head(trained)
        if not head.is_dir():
            print(f"not trained, so not measured: {trained.name}", flush=True)
            continue
        k = NUM_DRAFT_TOKENS
        config = {"method": "vispec", "model": str(head), "num_speculative_tokens": k}
        job = Job(study.target, config, per_family=study.per_family)
        jobs[study.result(CELLS, trained)] = job
    samples = enumerate(family for family in FAMILIES for _ in range(study.per_family))
    plan = [((sample,), (family,)) for sample, family in samples]
    plain = Job(study.target, per_family=study.per_family)
    measure(jobs, plain, plan, study.logs, threads=study.threads)


def read_all(study: Study) -> Found:
    """Answers with the heads of all variants of which every seed was measured."""
    found: dict[tuple[str, int], Seeds] = {}
    for variant in study.variants:
        for epochs in variant.epochs:
            files = [study.result(CELLS, Trained(variant, epochs, seed)) for seed in study.seeds]
            if all(file.is_file() for file in files):
                found[variant.name, epochs] = [read_measured(file).calls for file in files]
    return found


def make_rows(study: Study, found: Found) -> list[dict[str, Any]]:
    """One row of the JSON per measured variant and number of epochs."""
    return [
        _row(variant, epochs, study.seeds, found)
        for variant in study.variants
        for epochs in variant.epochs
        if (variant.name, epochs) in found
    ]


def _row(variant: Variant, epochs: int, seeds: Sequence[int], found: Found) -> dict[str, Any]:
    calls, before = found[variant.name, epochs], found.get((variant.after, epochs))
    same, compared = identical([one for of_seed in calls for one in of_seed]) or (0, 0)
    several = len(variant.epochs) > 1
    return {
        "variant": variant.name,
        "label": f"{variant.label}, epoch {epochs}" if several else variant.label,
        "data": variant.data,
        "answers": variant.answers,
        "settings": variant.settings,
        "epochs": epochs,
        "seeds": seeds,
        "identical": same,
        "answers_compared": compared,
        "acceptance_length": {
            name: estimate(only(calls, names), acceptance_length) for name, names in GROUPS.items()
        },
        "decode_speedup": {
            name: estimate(only(calls, names), decode_speedup) for name, names in GROUPS.items()
        },
        "over": variant.after,
        "acceptance_length_ratio": compare(calls, before) if before else None,
    }


def compare(calls: Seeds, before: Seeds) -> dict[str, Any]:
    """Ratio of acceptance_length on the image tasks."""
    names = GROUPS[IMAGES]
    return ratio(only(calls, names), only(before, names), acceptance_length)


def only(seeds: Seeds, families: Iterable[str]) -> list[list[Call]]:
    """Of every seed the calls about questions of these families."""
    return [[one for one in calls if one.families[0] in families] for calls in seeds]

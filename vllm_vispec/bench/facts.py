"""A run as one table: a row for every cell of the matrix, whatever became of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import chain
from math import inf
from typing import Any

import numpy as np
import pandas as pd

from vllm_vispec.bench.bootstrap import RESAMPLES, with_interval
from vllm_vispec.bench.matrix import VARIANTS, points
from vllm_vispec.bench.metrics import (
    BASELINE,
    METRICS,
    Cells,
    answered,
    baseline_key,
    by_key,
    measure,
    only_family,
)
from vllm_vispec.bench.schema import IMAGES_AS_THEY_ARE, BenchRun, CellKey

OURS = "vispec"
"""The variant a report is about, if it was measured."""
KEY = tuple(field.name for field in fields(CellKey))
_NUMBERS = [*(METRICS.keys() - {"acceptance_rate_per_position"}), "low", "high", "plain_length"]
_ORDER = ["dataset", "temperature", "images", "num_speculative_tokens", "concurrency"]
_BY_VARIANT = ["place", "variant"]


@dataclass(frozen=True, eq=False)
class Facts:
    """A run, arranged for the sections of a report.

    Attributes:
        table: a row per cell, its number the index: the fields of its key; ``images`` and
            ``place``, which order image tokens and variants; every metric by name, NaN if there is
            none, with ``low`` and ``high`` of decode_speedup; ``plain_length``, the
            baseline's mean output; ``cells`` and ``plain``, the repetitions; how many are
            ``expected`` and ``done``; its ``state``: "missing", "failed", "ok", or "1 of 3"
            repetitions.
        resamples: of every interval; fewer are quicker and coarser.
    """

    run: BenchRun
    table: pd.DataFrame
    resamples: int

    @classmethod
    def from_run(cls, run: BenchRun, resamples: int = RESAMPLES) -> Facts:
        """Measure every cell of a run."""
        groups, expected = by_key(run.cells), int(run.settings["repetitions"])
        rows = [
            _row(key, groups.get(key, ()), groups.get(baseline_key(key), ()), expected, resamples)
            for key in dict.fromkeys(chain(groups, *points(run.settings)))
        ]
        table = pd.DataFrame(rows).astype(dict.fromkeys(_NUMBERS, float))
        table = table.sort_values(_ORDER + _BY_VARIANT, kind="stable", ignore_index=True)
        return cls(run, table.set_axis(range(1, len(table) + 1)), resamples)

    @cached_property
    def drafting(self) -> pd.DataFrame:
        """Rows of all variants but the baseline."""
        return self.table[self.table.variant != BASELINE]

    @cached_property
    def variant(self) -> str:
        """The variant the report is about: ViSpec, else the last one that drafts."""
        variants: list[str] = self.drafting.sort_values(_BY_VARIANT, kind="stable").variant.tolist()
        return OURS if OURS in variants or not variants else variants[-1]

    @cached_property
    def main(self) -> Any | None:
        """The row a report leads with; None if no speedup could be computed.

        The lowest temperature and concurrency, images as they are (else the most image tokens),
        the first dataset; of these the K of which most was measured (of a star, its middle), then
        the one with the highest decode_speedup.
        """
        measured = timed(self.drafting[self.drafting.variant == self.variant])
        if measured.empty:
            return None
        places = ["temperature", "images", "concurrency", "dataset"]
        first = measured.sort_values(places, ascending=[True, False, True, True]).iloc[0]
        same = measured[(measured[places] == first[places]).all(axis=1)]
        counts = same.num_speculative_tokens.map(measured.num_speculative_tokens.value_counts())
        best = same[counts == counts.max()].decode_speedup.idxmax()
        return next(same.loc[[best]].itertuples())

    def like(self, row: Any, *free: str) -> pd.DataFrame:
        """Rows that draft at the point of a row, variants in order; the free fields may differ."""
        fixed = [self.drafting[name] == getattr(row, name) for name in KEY if name not in free]
        rows = self.drafting[np.logical_and.reduce(fixed)]
        return rows.sort_values(_BY_VARIANT, kind="stable")

    def of_family(self, rows: pd.DataFrame, family: str) -> pd.DataFrame:
        """The same rows with the requests of one task family only."""
        parts = [
            _row(
                CellKey(*(getattr(row, name) for name in KEY)),
                only_family(row.cells, family),
                only_family(row.plain, family),
                row.expected,
                self.resamples,
            )
            for row in rows.itertuples()
        ]
        return pd.DataFrame(parts, rows.index).astype(dict.fromkeys(_NUMBERS, float))


def timed(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with a speedup."""
    return rows[rows.decode_speedup.notna()]


def families(row: Any) -> list[str]:
    """Task families that were asked, in the order of the dataset."""
    return list(dict.fromkeys(one.family for cell in row.cells for one in cell.requests))


def _row(key: CellKey, cells: Cells, plain: Cells, expected: int, resamples: int) -> dict[str, Any]:
    done = sum(cell.error is None for cell in cells)
    state = "ok" if done >= expected else f"{done} of {expected}"
    speedup = with_interval("decode_speedup", cells, plain, resamples)
    return {
        **asdict(key),
        # Images as they are come last: how many tokens they have is not known.
        "images": inf if key.image_tokens == IMAGES_AS_THEY_ARE else key.image_tokens,
        "place": (*VARIANTS, key.variant).index(key.variant),
        **{name: measure(name, cells, plain) for name in METRICS},
        "low": speedup.low,
        "high": speedup.high,
        "plain_length": measure("mean_output_tokens", plain),
        "answers": len(answered(cells)),
        "cells": cells,
        "plain": plain,
        "expected": expected,
        "done": done,
        "state": (state if done else "failed") if cells else "missing",
    }

"""The report of a run that varied one axis at a time."""

from __future__ import annotations

from dataclasses import replace

from tests.bench.made_up_runs import RESAMPLES, made_up, text_of
from vllm_vispec.bench.facts import Facts
from vllm_vispec.bench.matrix import points
from vllm_vispec.bench.schema import BenchRun

SIDES = 3


def star() -> BenchRun:
    """A star around K = 4, images as they are, greedy, concurrency 1."""
    full = made_up(ks=(4, 2), temperatures=(0.0, 1.0), image_tokens=(-1, 0, 64))
    settings = {**full.settings, "design": "star"}
    wanted = points("star", settings)
    cells = [
        cell
        for cell in full.cells
        if any(
            all(getattr(cell.key, name) == value for name, value in vars(point).items())
            for point in wanted
        )
    ]
    return replace(full, settings=settings, cells=tuple(cells))


def test_only_the_star_is_expected() -> None:
    rows = Facts.of(star(), RESAMPLES).table
    # The middle, two more concurrencies, one more K and temperature, two sizes of images.
    assert len(rows) == SIDES * 7
    assert set(rows.state) == {"ok"}
    assert "None: every cell that was asked for was measured" in text_of(star(), "failures")


def test_it_leads_with_the_middle() -> None:
    main = Facts.of(star(), RESAMPLES).main
    assert main is not None
    assert main.num_speculative_tokens == 4
    # K = 2 is faster, and the answer does not hide it.
    assert "K = 4 (of 2, the fastest being 2 with 2.20x), greedy" in text_of(star(), "answer")

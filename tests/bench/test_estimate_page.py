"""The tables of docs/estimate.md are what the cost model says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bench.pairs_to_estimate import CHECKPOINTS, QWEN_7B, ROOT, folder, options
from vllm_vispec.bench.estimate.calibrate import (
    calibrate,
    calibration_to_markdown,
    hold_out,
    read_measured,
)
from vllm_vispec.bench.estimate.request import EstimateOptions, estimate
from vllm_vispec.bench.estimate.shapes import draft_shape, target_shape

PAGE = ROOT / "docs/estimate.md"
BATCHES = (1, 8, 32, 64, 128)
# Constant rates with which a chain of five accepts as many drafts as these figures say.
PUBLISHED = {
    "MMSpec's rerun, 1.29 accepted": 0.58,
    "the paper at temperature 1, 1.66": 0.655,
    "the paper, greedy, 2.24": 0.745,
}
DRAFT_VOCAB = 32768


def qwen(tmp_path: Path, rate: float, batches: tuple[int, ...]) -> EstimateOptions:
    head = folder(tmp_path / "vispec_head", {**QWEN_7B, "num_key_value_heads": 28})
    return replace(
        options(tmp_path),
        head=head,
        acceptance_rate=rate,
        num_speculative_tokens=tuple(range(1, 8)),
        batch_size=batches,
        context=1500,
    )


def best(settings: EstimateOptions) -> dict[str, Any]:
    rows: list[dict[str, Any]] = estimate(settings)["rows"]
    return max(rows, key=lambda row: row["decode_speedup"])


def speedups(tmp_path: Path) -> str:
    """decode_speedup by load and acceptance."""
    lines = ["| sequences at once | accepted 60 % | 70 % | 80 % |", "|---|---|---|---|"]
    for batch in BATCHES:
        cells = []
        for rate in (0.6, 0.7, 0.8):
            row = best(qwen(tmp_path, rate, (batch,)))
            ends = row["decode_speedup_by_overhead"]
            cells.append(
                f"{row['decode_speedup']:.1f} ({ends['twice']:.1f} to {ends['without']:.1f}), "
                f"K = {row['num_speculative_tokens']}"
            )
        lines.append(f"| {batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def published(tmp_path: Path) -> str:
    """The same from published figures, with the whole and a smaller lm_head for the draft."""
    lines = [
        "| acceptance | sequences at once | whole lm_head | 32,768 rows | gain | gone below a "
        "coverage of |",
        "|---|---|---|---|---|---|",
    ]
    for name, rate in PUBLISHED.items():
        for batch in (1, 16):
            whole = qwen(tmp_path, rate, (batch,))
            small = replace(whole, draft_vocab=DRAFT_VOCAB)
            one, other = best(whole), best(small)
            gain = other["decode_speedup"] / one["decode_speedup"] - 1
            lines.append(
                f"| {name} | {batch} | {one['decode_speedup']:.2f}, "
                f"K = {one['num_speculative_tokens']} | {other['decode_speedup']:.2f}, "
                f"K = {other['num_speculative_tokens']} | {gain:+.0%} | "
                f"{break_even(small, rate, one['decode_speedup']):.1%} |"
            )
    return "\n".join(lines)


def break_even(small: EstimateOptions, rate: float, wanted: float) -> float:
    """The coverage with which a smaller lm_head is as fast as the whole one."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        found = best(replace(small, acceptance_rate=rate * middle))["decode_speedup"]
        low, high = (low, middle) if found > wanted else (middle, high)
    return high


def calibration(tmp_path: Path) -> str:
    """What the model says about committed measurements it has not seen."""
    cells = read_measured(ROOT / "benchmarks/results/decode_speed.json", "vispec", 150)
    found = calibrate(
        cells,
        target_shape(CHECKPOINTS / "target", "float32"),
        draft_shape(CHECKPOINTS / "vispec_head", CHECKPOINTS / "target", "float32"),
        hold_out("k=5,10"),
    )
    return calibration_to_markdown(found).strip()


TABLES: dict[str, Callable[[Path], str]] = {
    "speedups": speedups,
    "published": published,
    "calibration": calibration,
}


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_are_what_the_model_says(tmp_path: Path, name: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    start = text.index("\n", text.index(f"<!-- {name}: ")) + 1
    end = text.index(f"<!-- /{name} -->")
    wanted = TABLES[name](tmp_path)
    if os.environ.get("VISPEC_WRITE_ESTIMATES"):
        text = text[:start] + wanted + "\n" + text[end:]
        PAGE.write_text(text, encoding="utf-8")
        end = text.index(f"<!-- /{name} -->")
    assert text[start:end].strip() == wanted


def test_the_config_on_the_page_is_the_one_that_was_used() -> None:
    text = PAGE.read_text(encoding="utf-8")
    start = text.index("{", text.index("config.json <<"))
    written, _ = json.JSONDecoder().raw_decode(text, start)
    assert written == {key: value for key, value in QWEN_7B.items() if key != "model_type"}


@pytest.mark.parametrize(
    ("accepted", "rate"), zip((1.29, 1.66, 2.24), PUBLISHED.values(), strict=True)
)
def test_the_rates_are_those_of_the_published_figures(accepted: float, rate: float) -> None:
    assert sum(rate**k for k in range(1, 6)) == pytest.approx(accepted, abs=0.02)

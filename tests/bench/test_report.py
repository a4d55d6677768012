"""The report on made-up runs: what it says, and what it admits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.bench.made_up_runs import (
    FAMILIES,
    RESAMPLES,
    alt_texts,
    fail_vispec_at_4,
    made_up,
    report,
    sections,
    table,
    tables_in,
    text_of,
)
from vllm_vispec.bench.facts import Facts
from vllm_vispec.bench.report import share
from vllm_vispec.bench.schema import BenchRun, CellResult

# What it says


def test_the_answer_is_one_sentence_with_everything_a_sceptic_asks_for() -> None:
    assert text_of(made_up(), "answer") == (
        "With ViSpec, K = 2 (the fastest of 2), greedy, at concurrency 1 on tiny suite, decoding "
        "is **2.20x (95 %: 2.20 to 2.20)** as fast as with plain vLLM, with 100 % of the outputs "
        "identical and 21.0 output tokens on average against 21.0; it gains at every concurrency "
        "measured, up to 16."
    )


def test_noise_is_not_sold_as_a_gain() -> None:
    def slow_half(one: CellResult) -> CellResult:
        if one.key.side != "vispec":
            return one
        factor = 0.4 if one.repetition else 2.6
        requests = tuple(
            replace(item, e2e_s=item.ttft_s + factor * item.decode_s) for item in one.requests
        )
        return replace(one, requests=requests)

    answer = text_of(made_up(slow_half, concurrency=(1,), ks=(4,)), "answer")
    assert "neither faster nor slower than plain vLLM beyond the noise" in answer


def test_a_loss_is_called_one() -> None:
    answer = text_of(made_up(concurrency=(16,), ks=(4,)), "answer")
    assert "decoding is only **0.90x" in answer


def test_every_table_with_a_speedup_has_equality_and_length_beside_it() -> None:
    text = report(made_up(image_tokens=(0, 64, -1), temperatures=(0.0, 1.0))).markdown
    heads = [one[0] for one in tables_in(text)]
    with_speedup = [head for head in heads if any("decode_speedup" in name for name in head)]
    assert len(with_speedup) >= 6
    for head in with_speedup:
        place = next(i for i, name in enumerate(head) if "decode_speedup" in name)
        assert head[place + 2 : place + 4] == ["identical outputs", "mean output, side / plain"]


def test_acceptance_per_position_adds_up() -> None:
    run = made_up(ks=(4,))
    expected = ["vispec", "90 %", "80 %", "70 %", "60 %", "3.00", "4.00", "3"]
    assert table(run, "acceptance")[-1] == expected


def test_tasks_are_shown_one_by_one() -> None:
    rows = table(made_up(), "tasks")
    assert [row[:2] for row in rows] == [
        [family, side] for family in FAMILIES for side in ("eagle", "vispec")
    ]
    assert rows[0][-2] == "4"  # two samples, two repetitions


def test_losses_are_listed_with_the_setting_that_limits_them() -> None:
    text = text_of(made_up(), "losses")
    assert "slower than plain vLLM, decoding or as a whole, in 1 of the 6 cells" in text
    assert "| K = 4, concurrency 16, greedy" in text
    assert "| yes | K = 2 at this load, with 1.10 | **0.90" in text
    assert '"model": "some/head", "num_speculative_tokens": 2}' in text
    assert "vispec bench tune" in text


def test_shorter_outputs_are_seen_beside_the_speedup() -> None:
    def shorter(one: CellResult) -> CellResult:
        if one.key.side == "plain":
            return one
        requests = tuple(replace(item, output_tokens=11) for item in one.requests)
        return replace(one, requests=requests)

    assert "11.0 / 21.0" in text_of(made_up(shorter), "concurrency")


def test_all_but_one_identical_is_not_rounded_up() -> None:
    def one_of_many(one: CellResult) -> CellResult:
        many = tuple(replace(one.requests[0], sample_id=str(i)) for i in range(3000))
        if one.key.side != "plain" and one.repetition == 0:
            many = (replace(many[0], output_text="?"), *many[1:])
        return replace(one, requests=many)

    run = made_up(one_of_many, sides=("plain", "vispec"), concurrency=(1,), ks=(4,))
    rows = Facts.of(run, RESAMPLES).table
    found = rows[rows.side == "vispec"].identical_outputs.item()
    assert 0.9995 < found < 1
    assert share(found) == "99.9 %"


# What it admits


def test_failed_and_missing_cells_are_shown_as_such() -> None:
    run = made_up(fail_vispec_at_4, ks=(4,))
    failures = text_of(run, "failures")
    assert "**failed** in repetition 1: server died: out of memory" in failures
    assert "**missing**: repetition 2 of row 9 was not measured" in failures
    rows = {(row[1], row[4]): row for row in table(run, "cells")}
    assert rows["vispec", "4"][7:] == ["**failed**", "**failed**", *["-"] * 4]
    # In the section on concurrency, too; the line of the chart has a gap there.
    text = text_of(run, "concurrency")
    assert "| vispec | 4 | **failed** |" in text
    alt = alt_texts(text)["speedup_concurrency"]
    assert re.search(r"vispec: \S+ at 1, \S+ at 16", alt)
    assert rows["vispec", "16"][7] == "**1 of 2**"
    assert rows["vispec", "1"][7] == "ok"


def test_a_failed_plain_side_leaves_no_speedup() -> None:
    def no_plain(one: CellResult) -> CellResult:
        failed = replace(one, requests=(), error="no")
        return failed if one.key.side == "plain" else one

    run = made_up(no_plain)
    assert "No answer" in text_of(run, "answer")
    assert "Not known: no speedup" in text_of(run, "losses")
    assert table(run, "cells")[0][8] == "-"


@pytest.mark.parametrize(
    "run",
    [
        BenchRun(1, {}, {}, ()),
        made_up(sides=("plain",), concurrency=(1,), ks=(4,)),
        BenchRun(1, {"a": None}, {"sides": "all", "repetitions": True}, made_up().cells[:1]),
        BenchRun(1, {}, {}, made_up().cells[2:3]),
    ],
)
def test_sections_without_data_say_so_in_one_line(run: BenchRun) -> None:
    found = sections(run)
    for name, empty in {
        "answer": "No answer: ",
        "concurrency": "Not shown: fewer than two concurrencies ",
        "image_tokens": "Not shown: fewer than two numbers of image tokens ",
        "num_speculative_tokens": "Not shown: fewer than two values of K ",
        "tasks": "Not shown: the requests name no task families.",
    }.items():
        assert found[name].startswith(empty)
        assert "\n" not in found[name]
    assert report(run).html

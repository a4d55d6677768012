"""The report on made-up runs: what it says, and what it admits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.bench.made_up_runs import (
    FAMILIES,
    chapter,
    fail_vispec_at_4,
    made_up,
    report,
    table,
    text_of,
)
from vllm_vispec.bench.report import to_html, to_markdown
from vllm_vispec.bench.report.blocks import (
    Figure,
    Paragraph,
    Strong,
    Table,
)
from vllm_vispec.bench.report.facts import Facts
from vllm_vispec.bench.report.sections import SECTIONS
from vllm_vispec.bench.report.sections.base import share
from vllm_vispec.bench.schema import BenchRun, CellResult

# What it says


def test_the_answer_is_one_sentence_with_everything_a_sceptic_asks_for() -> None:
    blocks = chapter(made_up(), "answer").blocks
    assert len(blocks) == 1
    assert text_of(made_up(), "answer").split("\n\n")[2].strip() == (
        "With ViSpec, K = 2 (the fastest of 2), greedy, at concurrency 1 on tiny suite, decoding "
        "is **2.20x (95 %: 2.20 to 2.20)** as fast as with plain vLLM, with 100 % of the outputs "
        "identical and 21.0 output tokens on average against 21.0; it gains at every concurrency "
        "measured, up to 16."
    )


def test_the_answer_says_up_to_which_load_it_gains() -> None:
    answer = text_of(made_up(ks=(4,)), "answer")
    assert "**2.00x" in answer
    assert "it gains up to concurrency 4 and falls to 0.90x at 16." in answer


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


def test_without_vispec_the_report_is_about_the_side_that_was_measured() -> None:
    answer = text_of(made_up(sides=("plain", "ngram")), "answer")
    assert answer.startswith("# \n\n## Answer\n\nWith n-gram lookup, K = 2 (")


@pytest.mark.parametrize("name", ["concurrency", "num_speculative_tokens"])
def test_axes_have_a_chart_with_a_line_at_parity_and_a_table(name: str) -> None:
    blocks = chapter(made_up(), name).blocks
    figure = next(block for block in blocks if isinstance(block, Figure))
    assert "vispec: " in figure.alt
    assert "eagle: " in figure.alt
    assert "stroke-width: 3" in figure.svg  # the bold line
    assert "bold line at 1.0" in text_of(made_up(), name)
    assert "decode_speedup" in str(table(made_up(), name).head)


def test_every_table_with_a_speedup_has_equality_and_length_beside_it() -> None:
    document = report(made_up(image_tokens=(0, 64, -1), temperatures=(0.0, 1.0)))
    tables = [
        block for one in document.chapters for block in one.blocks if isinstance(block, Table)
    ]
    with_speedup = [one for one in tables if any("decode_speedup" in str(h) for h in one.head)]
    assert len(with_speedup) >= 6
    for one in with_speedup:
        place = next(i for i, head in enumerate(one.head) if "decode_speedup" in str(head))
        assert one.head[place + 2 : place + 4] == (
            "identical outputs",
            "mean output, side / plain",
        )


def test_image_tokens_are_an_axis_with_images_as_they_are_at_its_end() -> None:
    figure = chapter(made_up(image_tokens=(-1, 64, 0)), "image_tokens").blocks[1]
    assert isinstance(figure, Figure)
    assert re.search(r"at 0, .* at 64, .* at as they are", figure.alt)


def test_sampled_cells_have_their_own_chart_and_no_equality() -> None:
    run = made_up(temperatures=(0.0, 1.0))
    figures = [b for b in chapter(run, "concurrency").blocks if isinstance(b, Figure)]
    assert [one.name for one in figures] == ["speedup_concurrency", "speedup_concurrency_2"]
    assert "sampled" in text_of(run, "concurrency")


def test_acceptance_per_position_adds_up() -> None:
    run = made_up(ks=(4,))
    assert table(run, "acceptance").rows[-1] == (
        "vispec",
        "90 %",
        "80 %",
        "70 %",
        "60 %",
        "3.00",
        "4.00",
        "3",
    )


def test_tasks_are_shown_one_by_one() -> None:
    rows = table(made_up(), "tasks").rows
    assert [row[:2] for row in rows] == [
        (family, side) for family in FAMILIES for side in ("eagle", "vispec")
    ]
    assert rows[0][-2] == "4"  # two samples, two repetitions


def test_losses_are_listed_with_the_setting_that_limits_them() -> None:
    text = text_of(made_up(), "losses")
    assert "slower than plain vLLM, decoding or as a whole, in 1 of the 6 cells" in text
    assert "| K = 4, concurrency 16, greedy" in text
    assert "| yes | K = 2 at this load, with 1.10 | **0.90" in text
    assert '"num_speculative_tokens_per_batch_size": [[1, 16, 2]]' in text
    assert '"model": "some/head"' in text
    assert "vispec bench tune" in text


def test_where_no_k_gains_drafting_is_switched_off() -> None:
    text = text_of(made_up(ks=(4,)), "losses")
    assert "K = 0 at this load: no K that was measured gains" in text
    assert '"num_speculative_tokens_per_batch_size": [[1, 15, 4], [16, 16, 0]]' in text


def test_without_losses_it_says_how_close_it_came() -> None:
    text = text_of(made_up(concurrency=(1, 4)), "losses")
    assert "slower than plain vLLM in none of the 4 cells measured" in text
    assert "lowest decode_speedup is 1.50 at K = 4, concurrency 4" in text


def test_late_first_tokens_and_different_outputs_are_losses_too() -> None:
    def flawed(one: CellResult) -> CellResult:
        if one.key.side == "plain":
            return one
        late = [replace(item, ttft_s=0.6, e2e_s=item.e2e_s + 0.1) for item in one.requests]
        late[0] = replace(late[0], output_text="something else")
        return replace(one, requests=tuple(late))

    run = made_up(flawed)
    text = text_of(run, "losses")
    assert "The first token comes more than 5% later than without drafting in 6 of 6" in text
    assert "Greedy outputs differ from plain vLLM's in 6 of 6 cells, at most 25.0 %" in text
    assert "with 75 % of the outputs identical" in text_of(run, "answer")
    assert "**75 %**" in text_of(run, "cells")


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
    row = next(row for row in Facts(run).rows if row.key.side == "vispec")
    found = row.value("identical_outputs")
    assert found is not None
    assert 0.9995 < found < 1
    assert share(found) == "99.9 %"


# What it admits


def test_failed_and_missing_cells_are_shown_as_such() -> None:
    run = made_up(fail_vispec_at_4, ks=(4,))
    failures = text_of(run, "failures")
    assert "**failed** in repetition 1: server died: out of memory" in failures
    assert "**missing**: repetition 2 of row 9 was not measured" in failures
    rows = {(row[1], row[4]): row for row in table(run, "cells").rows}
    assert rows["vispec", "4"][7] == Strong("failed")
    assert rows["vispec", "4"][8:] == (Strong("failed"), *("-",) * 4)
    # In the section on concurrency, too; the line of the chart has a gap there.
    assert "| vispec | 4 | **failed** |" in text_of(run, "concurrency")
    figure = chapter(run, "concurrency").blocks[1]
    assert isinstance(figure, Figure)
    assert re.search(r"vispec: \S+ at 1, \S+ at 16", figure.alt)
    assert rows["vispec", "16"][7] == Strong("1 of 2")
    assert rows["vispec", "1"][7] == "ok"


def test_cells_that_were_never_begun_are_missing_rows() -> None:
    run = made_up(lambda one: None if one.key.side == "vispec" else one, ks=(4,))
    rows = [row for row in table(run, "cells").rows if row[1] == "vispec"]
    assert [row[7] for row in rows] == [Strong("missing")] * 3
    assert "No answer" in text_of(run, "answer")
    line = "- **missing**: repetition 1, 2 of rows 3, 6, 9 was not measured"
    assert line in text_of(run, "failures")


def test_a_failed_plain_side_leaves_no_speedup() -> None:
    def no_plain(one: CellResult) -> CellResult:
        failed = replace(one, requests=(), error="no")
        return failed if one.key.side == "plain" else one

    run = made_up(no_plain)
    assert "No answer" in text_of(run, "answer")
    assert "Not known: no speedup" in text_of(run, "losses")
    assert table(run, "cells").rows[0][8] == "-"


def test_failed_requests_are_counted_and_their_reason_given() -> None:
    def one_fails(one: CellResult) -> CellResult:
        first = replace(one.requests[0], output_text="", output_tokens=0, error="HTTP 500")
        return replace(one, requests=(first, *one.requests[1:]))

    run = made_up(one_fails)
    assert "25 % of the requests failed, first error: HTTP 500" in text_of(run, "failures")
    assert "Requests failed in 6 of 6 cells" in text_of(run, "losses")


def test_a_run_without_flaws_says_so() -> None:
    assert "None: every cell that was asked for was measured" in text_of(made_up(), "failures")


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
    document = report(run)
    assert [one.name for one in document.chapters] == list(SECTIONS)
    for name in ("answer", "concurrency", "image_tokens", "num_speculative_tokens", "tasks"):
        one = next(one for one in document.chapters if one.name == name)
        assert one.blocks == (Paragraph(SECTIONS[name].empty),)
        assert "\n" not in SECTIONS[name].empty
    assert to_html(document)
    assert to_markdown(document)

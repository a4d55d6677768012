"""The report on made-up runs: what it says and admits; its pages; the run that is kept."""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.bench.made_up_runs import (
    EVIL,
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
from vllm_vispec.bench.matrix import points
from vllm_vispec.bench.pages import code, escape
from vllm_vispec.bench.report import share, write_report
from vllm_vispec.bench.schema import (
    CELLS_FILE,
    PACKED_FILE,
    RUN_FILE,
    BenchRun,
    CellResult,
)
from vllm_vispec.cli.bench import app
from vllm_vispec.utils.errors import ViSpecError

ROOT = Path(__file__).parents[2]

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
        if one.key.variant != "vispec":
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
        assert head[place + 2 : place + 4] == ["identical outputs", "mean output, variant / plain"]


def test_acceptance_per_position_adds_up() -> None:
    run = made_up(ks=(4,))
    expected = ["vispec", "90 %", "80 %", "70 %", "60 %", "3.00", "4.00", "3"]
    assert table(run, "acceptance")[-1] == expected


def test_tasks_are_shown_one_by_one() -> None:
    rows = table(made_up(), "tasks")
    assert [row[:2] for row in rows] == [
        [family, variant] for family in FAMILIES for variant in ("eagle", "vispec")
    ]
    assert rows[0][-2] == "4"  # two samples, two repetitions


def test_losses_are_listed_with_the_setting_that_limits_them() -> None:
    text = text_of(made_up(), "losses")
    assert "slower than plain vLLM, decoding or as a whole, in 1 of the 6 cells" in text
    assert "| K = 4, concurrency 16, greedy" in text
    assert "| yes | K = 2 at this load, with 1.10 | **0.90" in text
    assert '"model": "some/head", "num_speculative_tokens": 2, "adaptive": false}' in text
    assert "vispec bench tune" in text


def test_shorter_outputs_are_seen_beside_the_speedup() -> None:
    def shorter(one: CellResult) -> CellResult:
        if one.key.variant == "plain":
            return one
        requests = tuple(replace(item, output_tokens=11) for item in one.requests)
        return replace(one, requests=requests)

    assert "11.0 / 21.0" in text_of(made_up(shorter), "concurrency")


def test_all_but_one_identical_is_not_rounded_up() -> None:
    def one_of_many(one: CellResult) -> CellResult:
        many = tuple(replace(one.requests[0], sample_id=str(i)) for i in range(3000))
        if one.key.variant != "plain" and one.repetition == 0:
            many = (replace(many[0], output_text="?"), *many[1:])
        return replace(one, requests=many)

    run = made_up(one_of_many, variants=("plain", "vispec"), concurrency=(1,), ks=(4,))
    rows = Facts.from_run(run, RESAMPLES).table
    found = rows[rows.variant == "vispec"].identical_outputs.item()
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


def test_a_failed_baseline_leaves_no_speedup() -> None:
    def no_plain(one: CellResult) -> CellResult:
        failed = replace(one, requests=(), error="no")
        return failed if one.key.variant == "plain" else one

    run = made_up(no_plain)
    assert "No answer" in text_of(run, "answer")
    assert "Not known: no speedup" in text_of(run, "losses")
    assert table(run, "cells")[0][8] == "-"


SMALL = made_up(concurrency=(1,), ks=(4,))


@pytest.mark.parametrize(
    "run",
    [
        replace(SMALL, cells=()),
        made_up(variants=("plain",), concurrency=(1,), ks=(4,)),
        replace(SMALL, machine={"a": None}, cells=SMALL.cells[:1]),
        replace(SMALL, machine={}, cells=SMALL.cells[2:3]),
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


VARIANTS = 3


def star() -> BenchRun:
    """A star around K = 4, images as they are, greedy, concurrency 1."""
    full = made_up(ks=(4, 2), temperatures=(0.0, 1.0), image_tokens=(-1, 0, 64))
    settings = {**full.settings, "design": "star"}
    wanted = list(chain.from_iterable(points(settings)))
    cells = [cell for cell in full.cells if cell.key in wanted]
    return replace(full, settings=settings, cells=tuple(cells))


def test_only_the_star_is_expected() -> None:
    rows = Facts.from_run(star(), RESAMPLES).table
    # The middle, two more concurrencies, one more K and temperature, two sizes of images.
    assert len(rows) == VARIANTS * 7
    assert set(rows.state) == {"ok"}
    assert "None: every cell that was asked for was measured" in text_of(star(), "failures")


def test_it_leads_with_the_middle() -> None:
    main = Facts.from_run(star(), RESAMPLES).main
    assert main is not None
    assert main.num_speculative_tokens == 4
    # K = 2 is faster, and the answer does not hide it.
    assert "K = 4 (of 2, the fastest being 2 with 2.20x), greedy" in text_of(star(), "answer")


class Page(HTMLParser):
    """Checks that tags close, and collects what the page would load."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_loads_nothing() -> None:
    text = report(made_up(image_tokens=(0, 64))).html
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(one.startswith(("#", "data:image/svg+xml;base64,")) for one in page.loads)
    assert "@import" not in text
    assert "url(" not in text
    for picture in (one for one in page.loads if one.startswith("data:")):
        svg = base64.b64decode(picture.split(",", 1)[1]).decode()
        links = re.findall(r'(?:xlink:href|src)="([^"]*)"', svg)
        assert all(link.startswith("#") for link in links)
        assert "<script" not in svg


def evil_run() -> BenchRun:
    def spoil(one: CellResult) -> CellResult:
        key = replace(one.key, dataset=EVIL)
        failed = one.key.variant == "eagle"
        requests = tuple(replace(item, family=EVIL) for item in one.requests)
        return replace(
            one,
            key=key,
            requests=requests,
            command=f"{one.command}\n{EVIL}\n```",
            error=EVIL if failed else None,
        )

    run = made_up(spoil)
    settings = {**run.settings, "target": EVIL, "dataset": EVIL, "note": f"line\n# {EVIL}"}
    return replace(run, machine={EVIL: EVIL, "list": [EVIL]}, settings=settings)


def test_nothing_a_user_wrote_becomes_html() -> None:
    text = report(evil_run()).html
    page = Page(text)
    assert page.open == []
    assert not {"script", "b", "em"} & set(page.tags)
    assert all(one.startswith(("#", "data:")) for one in page.loads)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert('x')" in text


def test_nothing_a_user_wrote_becomes_markdown() -> None:
    text = report(evil_run()).markdown
    fenced = re.sub(r"(`{3,})\n.*?\n\1(?!`)", "", text, flags=re.DOTALL)
    coded = re.sub(r"(`+) ?.*?[^`]\1(?!`)", "", fenced)
    assert "<script>" not in coded
    assert "**bold**" not in coded
    assert not re.search(r"(?<!\\)\]\(http", coded)
    assert not re.search(r"(?<!\\)\$x", coded)
    rows = [line for line in coded.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert len(rows) > 20
    assert max(widths) < 25


def test_what_is_filled_in_keeps_its_place() -> None:
    assert escape("x|y *z*\na_b _c_") == "x\\|y \\*z\\* a_b \\_c\\_"
    assert code("p | q", bar="\\|") == "`p \\| q`"
    assert code("a|b") == "`a|b`"
    assert code("`") == "`` ` ``"
    assert code("") == ""


def test_a_run_in_any_form_gives_the_same_bytes(tmp_path: Path) -> None:
    run = made_up(image_tokens=(0, -1), variants=("plain", "vispec"), concurrency=(1, 4))
    folder, packed, file = (tmp_path / name for name in ("run", "packed", "run.json"))
    plain = run.to_json()
    file.write_text(json.dumps(plain))
    lines = "".join(json.dumps(one) + "\n" for one in plain.pop("cells"))
    for one in (folder, packed):
        one.mkdir()
        (one / RUN_FILE).write_text(json.dumps(plain))
    (folder / CELLS_FILE).write_text(lines)
    (packed / PACKED_FILE).write_bytes(gzip.compress(lines.encode()))
    first, *others = [
        write_report(one, tmp_path / f"of-{one.name}", RESAMPLES) for one in (folder, packed, file)
    ]
    for other in others:
        assert other.html.read_bytes() == first.html.read_bytes()
        assert other.markdown.read_bytes() == first.markdown.read_bytes()
        assert [p.read_bytes() for p in other.plots] == [p.read_bytes() for p in first.plots]
    assert len(first.plots) == 4
    for picture in re.findall(r"\]\((plots/[^)]*)\)", first.markdown.read_text()):
        assert (first.markdown.parent / picture).is_file()


def test_unreadable_runs_and_folders_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(ViSpecError, match="cannot be read"):
        write_report(tmp_path / "nowhere", tmp_path / "out")
    run = tmp_path / RUN_FILE
    run.write_text(json.dumps(made_up(ks=(4,)).to_json()))
    for damaged in (gzip.compress(b"{}\n")[:-4], b"no archive"):
        (tmp_path / PACKED_FILE).write_bytes(damaged)
        with pytest.raises(ViSpecError, match="cannot be read"):
            write_report(tmp_path, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ViSpecError, match="cannot be written"):
        write_report(run, tmp_path / "file" / "out", RESAMPLES)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("vllm_vispec.bench.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pandas", None)
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "the report needs pandas: pip install 'vllm-vispec[bench]'" in result.output


@pytest.mark.parametrize("name", ["", "siblings"])
def test_the_kept_run_gives_the_kept_report(tmp_path: Path, name: str) -> None:
    kept = ROOT / "docs/report" / name
    files = write_report(ROOT / "benchmarks/results/pair_report" / name, tmp_path)
    assert files.markdown.read_text() == (kept / "report.md").read_text()
    names = sorted(file.name for file in (kept / "plots").iterdir())
    assert sorted(plot.name for plot in files.plots) == names

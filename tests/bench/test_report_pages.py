"""The report as Markdown and HTML: nothing gets out of it, and it is the same each time."""

from __future__ import annotations

import base64
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.bench.made_up_runs import EVIL, RESAMPLES, made_up, report
from vllm_vispec.bench.pages import code, escape
from vllm_vispec.bench.report import write_report
from vllm_vispec.bench.schema import CELLS_FILE, RUN_FILE, BenchRun, CellResult
from vllm_vispec.cli.bench import app
from vllm_vispec.utils.errors import ViSpecError


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
        failed = one.key.side == "eagle"
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


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = made_up(image_tokens=(0, -1), sides=("plain", "vispec"), concurrency=(1, 4))
    folder = tmp_path / "run"
    folder.mkdir()
    plain = run.to_json()
    cells = plain.pop("cells")
    (folder / RUN_FILE).write_text(json.dumps(plain))
    (folder / CELLS_FILE).write_text("".join(json.dumps(one) + "\n" for one in cells))
    (tmp_path / "run.json").write_text(json.dumps(run.to_json()))
    first = write_report(folder, tmp_path / "a", RESAMPLES)
    second = write_report(tmp_path / "run.json", tmp_path / "b", RESAMPLES)
    assert first.html.read_bytes() == second.html.read_bytes()
    assert first.markdown.read_bytes() == second.markdown.read_bytes()
    assert [p.read_bytes() for p in first.plots] == [p.read_bytes() for p in second.plots]
    assert len(first.plots) == 4
    for picture in re.findall(r"\]\((plots/[^)]*)\)", first.markdown.read_text()):
        assert (tmp_path / "a" / picture).is_file()


def test_unreadable_runs_and_folders_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(ViSpecError, match="cannot be read"):
        write_report(tmp_path / "nowhere", tmp_path / "out")
    run = tmp_path / "run.json"
    run.write_text(json.dumps(made_up(ks=(4,)).to_json()))
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

"""The tools that watch over the repository can fail."""

from __future__ import annotations

import json

import pytest

from benchmarks.report import replace_section
from tools.house import ROOT, Measure, find_circles, imports_of
from tools.tables import PUBLISHED, QWEN_7B

PAGE = "# Page\n<!-- table: written by hand -->\nold\n<!-- /table -->\nend\n"


def test_a_section_is_replaced_between_its_markers() -> None:
    assert replace_section(PAGE, "table", "\nnew\n\n") == PAGE.replace("old", "new")


@pytest.mark.parametrize("page", ["no markers", PAGE + PAGE])
def test_markers_must_be_there_once(page: str) -> None:
    with pytest.raises(ValueError, match="must be there once"):
        replace_section(page, "table", "new")


def test_circles_are_found_one_by_one() -> None:
    graph = {"a": {"b"}, "b": {"c", "a"}, "c": {"a"}, "d": {"a"}}
    assert len(find_circles(graph)) == 2
    assert find_circles({"a": {"b"}, "b": set()}) == []


def test_imports_for_types_count_and_those_inside_functions_do_not() -> None:
    source = """
from typing import TYPE_CHECKING
from package import first
import package.second
if TYPE_CHECKING:
    from package.third import Name
def later():
    from package import fourth
"""
    known = {f"package.{name}": ROOT for name in ("first", "second", "third", "fourth")}
    found = set(imports_of("package.me", source, known))
    assert found == {"package.first", "package.second", "package.third"}


def test_the_config_on_the_page_of_estimates_is_the_one_that_was_used() -> None:
    text = (ROOT / "docs/evidence/estimates.md").read_text(encoding="utf-8")
    written, _ = json.JSONDecoder().raw_decode(text, text.index("{", text.index("config.json <<")))
    assert written == {key: value for key, value in QWEN_7B.items() if key != "model_type"}


@pytest.mark.parametrize(
    ("accepted", "rate"), zip((1.29, 1.66, 2.24), PUBLISHED.values(), strict=True)
)
def test_the_rates_are_those_of_the_published_figures(accepted: float, rate: float) -> None:
    assert sum(rate**k for k in range(1, 6)) == pytest.approx(accepted, abs=0.02)


@pytest.mark.parametrize(
    ("measure", "is_exceeded"),
    [
        (Measure("lines", 10, 10), False),
        (Measure("lines", 11, 10), True),
        (Measure("lines", 11, 10, 12), False),
        (Measure("lines", 13, 10, 12), True),
    ],
)
def test_a_ceiling_holds_until_the_limit_is_reached(measure: Measure, is_exceeded: bool) -> None:
    assert measure.is_exceeded == is_exceeded

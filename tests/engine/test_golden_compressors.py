"""The golden prompts with heads of every compressor: the recorded ids, whatever is drafted."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.child import run_in_subprocess
from tests.support.golden import golden_dir, load_cases
from tests.support.runners import RUNNERS
from vllm_vispec.compressors.spec import COMBINATIONS, PRIMITIVES, QUERY, parse_compressor

pytestmark = [pytest.mark.golden, pytest.mark.slow, pytest.mark.timeout(1800)]

# By target: Llava's images have more tokens and touch, Qwen's are small.
COMPRESSORS = (
    ("prune:4", "conv:3", "concat", "select"),
    ("pool:3", "resampler:3", "text_only", "weighted", "select(prune:1,text_only)"),
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every case of a target with each of the target's compressors."""
    kwargs = {
        "cases_dir": str(golden_dir()),
        "work_dir": str(tmp_path_factory.mktemp("golden")),
        "compressors": COMPRESSORS,
    }
    return run_in_subprocess(
        "tests.support.golden_jobs:serve_compressors", kwargs, RUNNERS["v1"].env(), timeout=1500
    )


def test_every_compressor_is_among_them() -> None:
    names = {parse_compressor(text).name for texts in COMPRESSORS for text in texts}
    assert names == {*PRIMITIVES, *COMBINATIONS} - {QUERY}


@pytest.mark.parametrize("text", [text for texts in COMPRESSORS for text in texts])
def test_golden_ids(served: list[dict[str, Any]], text: str) -> None:
    wanted = {case.name: case.greedy_ids for case in load_cases()}
    found = [item for item in served if item["compressor"] == text]
    assert len(found) >= 3
    for item in found:
        assert "error" not in item, item["error"]
        assert item["token_ids"] == wanted[item["name"]]
        assert item["drafted"]

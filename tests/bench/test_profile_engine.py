"""A profile of the shipped pair, with real engines on both runners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from examples.tiny_vlm.questions import write_questions
from tests.bench.fakes import HEAD, SAMPLES, TARGET
from vllm_vispec.bench.datasets import DatasetOptions, load_dataset
from vllm_vispec.bench.profile import ProfileSettings, run_profile
from vllm_vispec.bench.profile_steps import INCOMPLETE, columns
from vllm_vispec.bench.schema import IMAGES_AS_THEY_ARE
from vllm_vispec.utils.errors import ViSpecError

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SERVE_ARGS = (
    *("--dtype=float32", "--max-model-len=512"),
    *("--max-num-seqs=4", "--max-num-batched-tokens=512"),
)
INTERPRETED = "Triton interpreter"
ONLY_OURS, OF_IMAGES = {"adaptor", "row_ids"}, {"adaptor", "vision_tower"}
# Both sides' heads embed tokens inside their passes.
OF_PUBLISHED = {"draft_embedding"}


def profiled(folder: Path, max_tokens: int, **settings: Any) -> dict[str, Any]:
    """Measure, and check what holds on every runner."""
    write_questions(folder, "heldout", 100_000, 2, ("captioning", "charts"))
    pair: dict[str, Any] = {"target": str(TARGET), "head": str(HEAD), "serve_args": SERVE_ARGS}
    given = ProfileSettings(**pair, data=str(folder), dataset="tiny", **settings)
    options = DatasetOptions(limit=2, max_tokens=max_tokens)
    profile = run_profile(given, load_dataset("tiny", folder, options).samples, folder / "out")
    for side in ("eagle", "vispec"):
        assert INCOMPLETE not in profile["left_out"][side]
        for kind in ("decode", "prefill"):
            assert list(profile[kind]["parts"]) == list(columns(given.num_speculative_tokens))
            absent = OF_PUBLISHED | (OF_IMAGES if kind == "decode" else set())
            check_side(profile[kind], side, absent | (ONLY_OURS if side == "eagle" else set()))
    return profile


def check_side(found: dict[str, Any], side: str, absent: set[str]) -> None:
    """Every part takes time where it is, and parts add up to a step."""
    for name, part in found["parts"].items():
        assert (part[side]["median"] > 0) == (name not in absent), (side, name, part)
    wholes = {name: one[side] for name, one in found["wholes"].items()}
    total = sum(part[side]["typical"] for part in found["parts"].values())
    assert total == pytest.approx(wholes["step"]["typical"])
    first, drafting, step = (wholes[name]["median"] for name in ("first_pass", "propose", "step"))
    assert 0 < first < drafting < step


def test_v1(tmp_path: Path) -> None:
    sizes = (IMAGES_AS_THEY_ARE, 0)
    profile = profiled(tmp_path, 16, runner="v1", repetitions=2, image_tokens=sizes)
    # Two samples twice, with and without their images.
    assert profile["prefill"]["steps"] == 8
    assert profile["decode"]["steps"] >= 8
    without, *others = profile["prefill_by_image_tokens"]
    assert (without["image_tokens"], without["steps"]) == (0, 4)
    assert sum(row["steps"] for row in others) == 4
    for row in others:
        assert row["image_tokens"] > 0
        assert row["parts"]["vision_tower"]["eagle"]["median"] > 0
    assert without["parts"]["adaptor"]["vispec"]["median"] == 0
    assert INTERPRETED not in (tmp_path / "out" / "profile.md").read_text()


@pytest.mark.v2
def test_v2(tmp_path: Path) -> None:
    few = {"concurrency": 2, "num_speculative_tokens": 2, "repetitions": 1}
    profile = profiled(tmp_path, 6, runner="v2", **few)
    assert [row["requests"] for row in profile["prefill_by_image_tokens"]] == [2]
    assert INTERPRETED in (tmp_path / "out" / "profile.md").read_text()


def test_options_that_no_engine_takes(tmp_path: Path) -> None:
    settings = ProfileSettings(
        target=str(TARGET), head=str(HEAD), data="d", serve_args=("--nonsense", "3")
    )
    with pytest.raises(ViSpecError, match="--serve --nonsense 3: an engine of vLLM does not"):
        run_profile(settings, SAMPLES, tmp_path)

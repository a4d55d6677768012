"""A profile of the shipped pair, with real engines on both runners."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from examples.tiny_vlm.questions import write_questions
from tests.bench.fakes import HEAD, SAMPLES, TARGET
from vllm_vispec.bench.datasets import DatasetOptions, load_dataset
from vllm_vispec.bench.profile import ProfileSettings, run_profile
from vllm_vispec.bench.profile_engine import RUNNERS
from vllm_vispec.bench.profile_result import Profile
from vllm_vispec.bench.profile_steps import INCOMPLETE, columns
from vllm_vispec.bench.schema import IMAGES_AS_THEY_ARE
from vllm_vispec.utils.errors import ViSpecError

pytestmark = [pytest.mark.engine, pytest.mark.slow]

INTERPRETED = RUNNERS["v2"].note_on_cpu
SERVE = "--dtype float32 --max-model-len 512 --max-num-seqs 4 --max-num-batched-tokens 512"
ONLY_OURS = {"adaptor", "row_codes"}


@dataclass(frozen=True)
class Case:
    """What is profiled on a runner; little where Triton's interpreter is slow."""

    runner: str
    concurrency: int
    num_speculative_tokens: int
    max_tokens: int
    repetitions: int
    image_tokens: tuple[int, ...] = (IMAGES_AS_THEY_ARE,)

    def run(self, folder: Path) -> Profile:
        """Measure."""
        write_questions(folder, "heldout", 100_000, 2, ("captioning", "charts"))
        settings = ProfileSettings(
            str(TARGET),
            str(HEAD),
            str(folder),
            "tiny",
            num_speculative_tokens=self.num_speculative_tokens,
            runner=self.runner,
            concurrency=self.concurrency,
            repetitions=self.repetitions,
            image_tokens=self.image_tokens,
            serve=SERVE,
        )
        options = DatasetOptions(limit=2, max_tokens=self.max_tokens)
        samples = load_dataset("tiny", folder, options).samples
        return run_profile(settings, samples, folder / "out")


def check(case: Case, profile: Profile) -> None:
    """What holds on every runner."""
    drafts = case.num_speculative_tokens
    for side in ("eagle", "vispec"):
        assert INCOMPLETE not in profile.left_out[side]
    for kind, summary in profile.rounds.items():
        assert summary.rounds >= 1
        assert list(summary.parts) == list(columns(kind, drafts))
        for side in ("eagle", "vispec"):
            check_side(profile, kind, side)


def check_side(profile: Profile, kind: str, side: str) -> None:
    """Every part takes time on the side that has it, and parts add up to a round."""
    summary = profile.rounds[kind]
    for name, part in summary.parts.items():
        has_it = side == "vispec" or name not in ONLY_OURS
        seconds = getattr(part, side).median
        assert (seconds > 0) == has_it, (kind, side, name, seconds)
    whole = getattr(summary.wholes["round"], side)
    total = sum(summary.typical[side].values())
    assert total >= whole.first_decile * 0.999999
    propose = getattr(summary.wholes["propose"], side).median
    assert 0 < getattr(summary.wholes["first_pass"], side).median < propose < whole.median


def test_v1(tmp_path: Path) -> None:
    case = Case("v1", 1, 4, 16, 2, image_tokens=(IMAGES_AS_THEY_ARE, 0))
    profile = case.run(tmp_path)
    check(case, profile)
    # Two samples twice, with and without their images.
    assert profile.rounds["prefill"].rounds == 8
    assert profile.rounds["decode"].rounds >= 8
    without, *others = profile.prefill_by_image_tokens
    assert (without.image_tokens, without.summary.rounds) == (0, 4)
    assert sum(row.summary.rounds for row in others) == 4
    for row in others:
        assert row.image_tokens > 0
        assert row.summary.parts["vision_tower"].eagle.median > 0
    assert without.summary.parts["adaptor"].vispec.median == 0
    assert INTERPRETED not in profile.notes


@pytest.mark.v2
def test_v2(tmp_path: Path) -> None:
    case = Case("v2", 2, 2, 6, 1)
    profile = case.run(tmp_path)
    check(case, profile)
    assert [row.requests for row in profile.prefill_by_image_tokens] == [2]
    assert profile.notes[0] == INTERPRETED
    assert INTERPRETED in (tmp_path / "out" / "profile.md").read_text()


def test_options_that_no_engine_takes(tmp_path: Path) -> None:
    settings = ProfileSettings(str(TARGET), str(HEAD), "d", serve="--nonsense 3")
    with pytest.raises(ViSpecError, match="--serve --nonsense 3: an engine of vLLM does not"):
        run_profile(settings, SAMPLES, tmp_path)

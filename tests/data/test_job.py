"""The job around the engine: counts, resuming, settings, and what must not happen to its files."""

from __future__ import annotations

import fcntl
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.data.fakes import COUNT, FakeBackend, Killed, changed, record, records, rejected, run
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.regenerate.dialogue import Answer, Dialogue, Regenerated, Result
from vllm_vispec.data.regenerate.offline import OfflineBackend, sampling_params
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.types import Conversation, Rejected
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import as_flag, parse


def test_counts_add_up(settings: RegenerateSettings) -> None:
    backend = FakeBackend()
    summary = run(settings, backend)
    assert (summary.total, summary.success, summary.error, summary.skipped) == (9, COUNT, 3, 0)
    assert summary.answers == 2 * COUNT
    assert summary.answer_tokens == 6 * COUNT
    assert rejected(settings) == {
        "lost": "image none.png does not exist",
        "line8": "line 8: not JSON",
        "s0#line9": "id s0 was there before",
    }
    assert dict(summary.reasons) == {"does not exist": 1, "not JSON": 1, "was there before": 1}
    saved = json.loads(Path(f"{settings.output}.summary.json").read_text())
    assert saved == vars(summary)
    assert backend.closed == 1


def test_record(settings: RegenerateSettings) -> None:
    run(settings, FakeBackend())
    found = {item["id"]: item for item in records(settings)}["s2"]
    texts = [part.get("text") for turn in found.pop("messages") for part in turn["content"]]
    assert found == {
        "id": "s2",
        "family": "vqa",
        "response_token_ids": [[1, 2, 3], [1, 2, 3]],
        "finish_reason": ["stop", "stop"],
        "round_trip": None,
        "prompt_style": "auto",
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": 0,
        "model": "some/target",
    }
    request = "\nAnswer at length, with at least 1000 words."
    # A turn that shows no image is not asked for a thousand words.
    expected = [None, "What is it?" + request, "s2 says 0", "Sure?", "s2 says 1"]
    assert texts == expected


def test_the_output_can_be_read_back(settings: RegenerateSettings) -> None:
    run(settings, FakeBackend())
    items = [one for one in read_conversations(settings.output) if isinstance(one, Conversation)]
    assert len(items) == COUNT
    image = settings.output.parent / items[0].images[0]
    assert image.samefile(settings.input.parent / "a.png")
    rooted = changed(
        settings,
        image_root=settings.input.parent,
        output=settings.output.with_name("rooted.jsonl"),
        prompt_text="Be thorough.",
    )
    run(rooted, FakeBackend())
    found = records(rooted)[0]
    assert found["messages"][0]["content"][0] == {"type": "image", "image": "a.png"}
    assert found["messages"][0]["content"][1]["text"] == "What is it?\nBe thorough."
    assert found["prompt_style"] == "own"


def test_killed_and_resumed(settings: RegenerateSettings) -> None:
    first = FakeBackend(dies_at=4)
    with pytest.raises(Killed):
        run(settings, first)
    assert first.closed == 1
    kept = settings.output.read_bytes()
    assert len(records(settings)) == 4
    second = FakeBackend()
    summary = run(settings, second)
    assert (summary.success, summary.error, summary.skipped) == (2, 3, 4)
    assert sorted(first.asked + second.asked) == [f"s{number}" for number in range(COUNT)]
    assert settings.output.read_bytes().startswith(kept)
    assert len(rejected(settings)) == 3


def test_finished_samples_start_no_engine_and_repaired_ones_are_tried_again(
    settings: RegenerateSettings,
) -> None:
    run(settings, FakeBackend())
    backend = FakeBackend()
    summary = run(settings, backend)
    assert (summary.success, summary.error, summary.skipped) == (0, 3, COUNT)
    assert backend.closed == 0
    (settings.input.parent / "none.png").write_bytes(b"there now")
    summary = run(settings, FakeBackend())
    assert (summary.success, summary.error, summary.skipped) == (1, 2, COUNT)
    assert "lost" not in rejected(settings)


def test_empty_answers_are_recorded_and_the_job_goes_on(settings: RegenerateSettings) -> None:
    def speak(dialogue: Dialogue) -> Answer:
        silent = dialogue.source.sample_id == "s1" and dialogue.answers
        return Answer(" \n" if silent else "words", "length", (1,), (9,))

    summary = run(settings, FakeBackend(speak))
    assert (summary.success, summary.error) == (COUNT - 1, 4)
    assert rejected(settings)["s1"] == "empty answer"
    assert summary.length == 2 * (COUNT - 1)


@pytest.mark.parametrize(("strict", "kept"), [(False, 1), (True, 0)])
def test_round_trip_failures(settings: RegenerateSettings, strict: bool, kept: int) -> None:
    class Changed(FakeBackend):
        def _one(self, conversation: Conversation) -> Regenerated:
            done = super()._one(conversation)
            assert isinstance(done, Regenerated)
            odd = conversation.sample_id == "s3"
            return replace(done, round_trip=not odd, round_trip_reason="so" if odd else "")

    summary = run(changed(settings, strict=strict), Changed())
    assert summary.round_trip_failed == 1
    assert summary.success == COUNT - 1 + kept
    expected = None if kept else "template round trip: so"
    assert rejected(settings).get("s3") == expected


def test_an_engine_without_a_request_is_not_stepped(settings: RegenerateSettings) -> None:
    """It would wait for its process, which has nothing to say, for ever."""

    class Refusing(OfflineBackend):
        def __init__(self) -> None:
            self.settings, self.limit = settings, 2

        def _enqueue(self, dialogue: Dialogue) -> str:
            raise ValueError("longer than the maximum context length")

        def _step(self, running: dict[str, Dialogue]) -> Iterator[Result]:
            pytest.fail("stepped")

    asked = [one for one in read_conversations(settings.input) if isinstance(one, Conversation)]
    assert [one.sample_id for one in asked] == [
        one.sample_id for one in Refusing().answer(asked) if isinstance(one, Rejected)
    ]


def test_a_backend_that_loses_samples_is_noticed(settings: RegenerateSettings) -> None:
    class Forgetful(FakeBackend):
        def answer(self, conversations: Any) -> Any:
            return super().answer(list(conversations)[:-1])

    with pytest.raises(ViSpecError, match="returned 5 of 6 samples"):
        run(settings, Forgetful())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt_style": "loud"}, "--prompt-style is 'loud': use one of auto, none"),
        ({"target": ""}, "--target is missing"),
        ({"workers": 0}, "--workers is 0: give at least 1"),
        ({"temperature": -1.0}, "--temperature is -1.0: give at least 0"),
        ({"top_p": 1.1}, "--top-p is 1.1: give at most 1"),
    ],
)
def test_bad_settings(settings: RegenerateSettings, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ViSpecError, match=named):
        parse(RegenerateSettings, dict(settings) | change, as_flag)


def test_seeds_differ_by_sample_turn_and_job(settings: RegenerateSettings) -> None:
    jobs = [changed(settings, seed=seed) for seed in range(3)]
    seeds = {job.seed_of(n, turn) for job in jobs for n in ("a", "b", "a0") for turn in range(3)}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert jobs[1].seed_of("a", 1) == changed(settings, seed=1).seed_of("a", 1)


def test_a_share_is_answered_greedily(settings: RegenerateSettings) -> None:
    settings = changed(settings, held_out=0.25)
    names = [f"s{number}" for number in range(400)]
    greedy = [name for name in names if settings.temperature_of(name) == 0]
    assert 70 < len(greedy) < 130
    assert {settings.temperature_of(name) for name in names} == {0.0, 1.0}
    for name in (greedy[0], next(one for one in names if one not in greedy)):
        params = sampling_params(settings, Dialogue(Conversation(name, ()), [], ()))
        assert params.temperature == settings.temperature_of(name)
    run(settings, FakeBackend())
    found = records(settings)
    assert found
    for one in found:
        assert one["temperature"] == settings.temperature_of(one["id"])


def test_half_a_line_is_dropped(settings: RegenerateSettings) -> None:
    run(settings, FakeBackend())
    whole = settings.output.read_bytes()
    settings.output.write_bytes(whole[:-9])
    summary = run(settings, FakeBackend())
    assert (summary.success, summary.skipped) == (1, COUNT - 1)
    assert settings.output.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": 0.0}, "temperature 1.0, now it is 0.0"),
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"prompt_style": "none"}, "prompt_style 'auto', now it is 'none'"),
        ({"target": "other"}, "target 'some/target', now it is 'other'"),
    ],
)
def test_never_mixes_configurations(
    settings: RegenerateSettings, change: dict[str, Any], named: str
) -> None:
    run(settings, FakeBackend())
    before = settings.output.read_bytes()
    with pytest.raises(ViSpecError, match="choose another file") as caught:
        run(changed(settings, **change), FakeBackend())
    assert named in str(caught.value)
    assert settings.output.read_bytes() == before


def test_foreign_or_damaged_output(settings: RegenerateSettings) -> None:
    settings.output.parent.mkdir()
    settings.output.write_text('{"id": "mine"}\n')
    with pytest.raises(ViSpecError, match="does not say how it was made"):
        run(settings, FakeBackend())
    assert settings.output.read_text() == '{"id": "mine"}\n'
    settings.output.unlink()
    run(settings, FakeBackend())
    lines = settings.output.read_text().splitlines()
    settings.output.write_text("\n".join([lines[0], "damaged", *lines[2:]]) + "\n")
    with pytest.raises(ViSpecError, match="line 2 is damaged; remove the line"):
        run(settings, FakeBackend())
    settings.input.write_text(json.dumps(record("new")) + "\n")
    with pytest.raises(ViSpecError, match="input_sha256"):
        run(settings, FakeBackend())


def test_output_in_use(settings: RegenerateSettings) -> None:
    run(settings, FakeBackend())
    with settings.beside("rejected.jsonl").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ViSpecError, match="written by another job"):
            run(settings, FakeBackend())
    assert run(settings, FakeBackend()).skipped == COUNT


def test_unusable_files(settings: RegenerateSettings) -> None:
    before = settings.input.read_bytes()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"output": settings.input}, "is the input"),
        ({"output": settings.input / "below" / "out.jsonl"}, "cannot be written"),
        ({"input": Path("none.jsonl")}, r"--input .* cannot be read"),
    ]
    for change, named in cases:
        with pytest.raises(ViSpecError, match=named):
            run(changed(settings, **change), FakeBackend())
    assert settings.input.read_bytes() == before


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``size`` bytes: writes are cut off, then fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_keeps_what_was_finished(settings: RegenerateSettings) -> None:
    run(settings, FakeBackend())
    whole = settings.output.read_bytes()
    settings.output.unlink()
    lines = whole.splitlines(keepends=True)
    room = len(b"".join(lines[:3])) + 40
    with (
        small_disk(room),
        pytest.raises(ViSpecError, match="3 finished samples are kept; make room") as caught,
    ):
        run(settings, FakeBackend())
    assert "\n" not in str(caught.value)
    assert settings.output.read_bytes() == b"".join(lines[:3])
    summary = run(settings, FakeBackend())
    assert (summary.success, summary.skipped) == (3, 3)
    assert settings.output.read_bytes() == whole

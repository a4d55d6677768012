"""Timing of the draft's part of a prefill, with engines that only say what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.compressors.prefill import REPETITIONS, take_turns
from vllm_vispec.bench.profile_steps import Step, Steps
from vllm_vispec.bench.schema import BenchSample


def question(image_tokens: int) -> list[BenchSample]:
    """A group of one sample, named after its image tokens."""
    return [BenchSample(str(image_tokens), "captioning", (), 3)]


class Engine:
    """Answers with prefills of a fixed cost, and remembers when it was asked."""

    def __init__(self, name: str, seconds: float, log: list[str]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def record(self, samples: Sequence[BenchSample]) -> Steps:
        self.log.append(self.name)
        size = int(samples[0].sample_id)
        wholes = {"first_pass": self.seconds * size, "round": 9.0}
        prefill = Step("prefill", 1, size + 20, size, {}, wholes)
        decode = Step("decode", 1, 0, 0, {}, {"first_pass": 100.0})
        return Steps((prefill, decode))


def test_engines_take_turns() -> None:
    log: list[str] = []
    found = take_turns(
        Engine("mine", 1.0, log), Engine("other", 2.0, log), [question(64), question(256)]
    )
    assert [(one.image_tokens, one.seconds, one.ratio) for one in found] == [
        (64, 64.0, 0.5), (256, 256.0, 0.5),
    ]  # fmt: skip
    assert (found[0].low, found[0].high) == (0.5, 0.5)
    warm, turns = log[:4], log[4:]
    assert sorted(warm) == ["mine", "mine", "other", "other"]
    assert turns[:8] == ["other", "mine", "other", "mine", "mine", "other", "mine", "other"]
    assert len(turns) == 4 * REPETITIONS

"""Made-up spans: an engine's steps on a clock that the test turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from vllm_vispec.bench import profile_steps as parts
from vllm_vispec.bench.profile_steps import Batch, Recorder, Steps, find_steps
from vllm_vispec.bench.schema import BenchSample

K = 3
DECODE = Batch((K + 1,), (K,))
OURS = ((parts.ROWS, 3.0), (parts.ADAPTOR, 5.0))


def prefill(tokens: int = 40, image_tokens: int = 30, computed: int = 0) -> Batch:
    """A batch of one whole prompt."""
    return Batch((tokens,), (0,), (tokens,), computed, image_tokens)


@dataclass
class Tape:
    """Records steps whose parts take as long as the test says.

    Attributes:
        time: of the clock, in seconds.
    """

    time: float = 0.0
    recorder: Recorder = field(init=False)

    def __post_init__(self) -> None:
        self.recorder = Recorder(lambda: self.time)

    def wait(self, seconds: float) -> None:
        """Let time go by in whatever is open."""
        self.time += seconds

    def leaf(self, name: str, seconds: float) -> None:
        """Record something without anything inside."""
        with self.recorder.span(name):
            self.wait(seconds)

    def step(
        self,
        batch: Batch,
        *,
        drafts: int = K,
        fills: Sequence[float] = (),
        first_pass: float = 20.0,
        vision: float = 0.0,
        ours: Sequence[tuple[str, float]] = (),
    ) -> None:
        """Record a step of the engine; without what varies, it takes 152 s with three drafts."""
        span = self.recorder.span
        with span(parts.STEP):
            self.wait(1)
            with span(parts.EXECUTE, batch):
                self.wait(2)
                if vision:
                    self.leaf(parts.VISION, vision)
                self.leaf(parts.TARGET_MODEL, 50)
                self.leaf(parts.TARGET_LOGITS, 7)
            with span(parts.SAMPLE):
                self.wait(4)
            with span(parts.PROPOSE):
                self.wait(6)
                for name, seconds in ours:
                    self.leaf(name, seconds)
                for seconds in fills:
                    self.leaf(parts.DRAFT_MODEL, seconds)
                for number in range(drafts):
                    self.leaf(parts.DRAFT_MODEL, 10 + number if number else first_pass)
                    with span(parts.DRAFT_SAMPLE):
                        self.wait(1)
                        self.leaf(parts.DRAFT_LOGITS, 12)

    def found(self, drafts: int = K, concurrency: int = 1) -> Steps:
        """Return the steps of what was recorded."""
        return find_steps(self.recorder.take(), drafts, concurrency)


@dataclass
class FakeEngine:
    """Stands in for an engine process: every answer is a prefill and some decoding steps.

    Attributes:
        decode_steps: of an answer.
        log: what happened, also to other engines.
    """

    side: str
    decode_steps: int = 3
    log: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.log.append(f"start {self.side}")
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append(f"end {self.side}")

    def answer(self, sample: BenchSample) -> str:
        """No sample here asks for one."""
        raise AssertionError(sample)

    def record(self, samples: Sequence[BenchSample]) -> Steps:
        """Return the steps of a made-up answer; ViSpec's first pass over a prompt is short."""
        self.log += [f"{self.side} {sample.sample_id}" for sample in samples]
        tape, is_ours = Tape(), self.side == "vispec"
        images = 30 if samples[0].sample_id == "s0" else 10
        tape.step(
            prefill(40, images),
            first_pass=8.0 if is_ours else 40.0,
            vision=25.0,
            ours=OURS if is_ours else (),
        )
        for _ in range(self.decode_steps):
            tape.step(DECODE, ours=OURS[:1] if is_ours else ())
        return tape.found()

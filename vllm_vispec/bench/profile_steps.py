"""Steps of an engine, split into parts: spans within spans, read off one clock."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from vllm_vispec.bench.schema import Record
from vllm_vispec.utils.errors import ViSpecError

EAGLE, VISPEC = SIDES = ("eagle", "vispec")
DECODE, PREFILL = "decode", "prefill"
KINDS = {DECODE: "Decoding steps", PREFILL: "Prefill steps"}
OTHER_BATCH, INCOMPLETE = "other batch", "incomplete"

# Names of spans; a span's own time is the part of this name, if there is one.
STEP, EXECUTE, DRAFT_MODEL = "step", "execute", "draft_model"
VISION, TARGET_MODEL, TARGET_LOGITS = "vision_tower", "target_pass", "target_lm_head"
SAMPLE, ADAPTOR, ROWS = "verification", "adaptor", "row_ids"
PROPOSE, DRAFT_LOGITS, DRAFT_SAMPLE = "draft_host", "draft_lm_head", "draft_sampling"
DRAFT_EMBED = "draft_embedding"
ONCE = (EXECUTE, TARGET_MODEL, TARGET_LOGITS, SAMPLE, PROPOSE)
# Parts that no span is named after.
FIRST_PASS, DRAFT_STEP, HOST = "draft_first_pass", "draft_step", "host"


class Part(NamedTuple):
    """How a part of a step is shown."""

    label: str
    color: str


PARTS = {
    VISION: Part("vision tower", "#f0e442"),
    TARGET_MODEL: Part("target pass", "#0072b2"),
    TARGET_LOGITS: Part("target lm_head", "#56b4e9"),
    SAMPLE: Part("verification and sampling", "#8c6d00"),
    ADAPTOR: Part("vision adaptor", "#009e73"),
    ROWS: Part("row ids", "#117733"),
    DRAFT_EMBED: Part("draft embeddings", "#aa4499"),
    FIRST_PASS: Part("draft first pass", "#d55e00"),
    DRAFT_STEP: Part("draft step", "#e69f00"),
    DRAFT_LOGITS: Part("draft lm_head", "#cc79a7"),
    DRAFT_SAMPLE: Part("draft sampling", "#882255"),
    PROPOSE: Part("host work of the draft", "#8c8c8c"),
    HOST: Part("host work, the rest", "#d0d0d0"),
}
WHOLES = {
    "first_pass": "first pass, call of the proposer to its logits",
    "draft_step": "draft step, logits to logits",
    "propose": "all of drafting",
    "step": "all of the step",
}
"""What overlaps the parts: times by other borders, the same on every runner."""


def columns(num_draft_tokens: int) -> dict[str, Part]:
    """Return the parts of a step by name, in order, every draft step apart.

    Their seconds add up to the step's.
    """
    found: dict[str, Part] = {}
    for name, part in PARTS.items():
        if name == DRAFT_STEP:
            for number in range(1, num_draft_tokens):
                found[f"{name}_{number}"] = Part(f"{part.label} {number}", part.color)
        else:
            found[name] = part
    return found


@dataclass(frozen=True)
class Batch:
    """What one target pass is over.

    Attributes:
        scheduled: tokens of every request.
        drafted: draft tokens among them, request by request.
        prompts: tokens of the prompts of the requests that enter with this batch.
        computed, image_tokens: of these prompts together.
    """

    scheduled: tuple[int, ...]
    drafted: tuple[int, ...]
    prompts: tuple[int, ...] = ()
    computed: int = 0
    image_tokens: int = 0

    @classmethod
    def from_scheduler(cls, scheduler_output: Any, *_: Any, **__: Any) -> Batch:
        """Return what vLLM's scheduler has put together for a step."""
        scheduled: Mapping[str, int] = scheduler_output.num_scheduled_tokens
        drafts = scheduler_output.scheduled_spec_decode_tokens
        new = scheduler_output.scheduled_new_reqs
        images = (image for request in new for image in request.mm_features or ())
        return cls(
            tuple(scheduled.values()),
            tuple(len(drafts.get(request, ())) for request in scheduled),
            tuple(len(request.prompt_token_ids or ()) for request in new),
            sum(request.num_computed_tokens for request in new),
            sum(image.mm_position.get_num_embeds() for image in images),
        )

    def kind(self, num_draft_tokens: int, concurrency: int) -> str | None:
        """Return which kind of step this is, None if neither counts.

        In a decoding step all requests are there and verify K draft tokens: steps of fewer, at the
        end of an answer, would mix engines that reach the end at different steps. In a prefill
        every request enters with its whole prompt.
        """
        if self.prompts == self.scheduled and not self.computed:
            return PREFILL
        wide = (num_draft_tokens + 1,) * concurrency, (num_draft_tokens,) * concurrency
        is_decode = not self.prompts and (self.scheduled, self.drafted) == wide
        return DECODE if is_decode else None


@dataclass
class Span:
    """Something that ran from ``begin`` to ``end``, in seconds.

    Attributes:
        own: seconds without those of the spans inside.
        batch: of a target pass.
    """

    name: str
    begin: float
    end: float = 0.0
    own: float = 0.0
    batch: Batch | None = None

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin


def wall_time() -> float:
    """Return the time once the device is idle.

    Waiting for the device takes away that host and device work at the same time; without it, work
    would be counted where the host waits for it, not where it is asked for.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


Clock = Literal["wall", "cpu"]
# ``cpu`` counts what this thread used, which other programs on a busy machine hardly change.
CLOCKS: Mapping[Clock, Callable[[], float]] = {"wall": wall_time, "cpu": time.thread_time}


@dataclass
class Recorder:
    """Collects spans of one thread in the order in which they begin.

    Attributes:
        now: the clock.
    """

    now: Callable[[], float]
    _spans: list[Span] = field(default_factory=list)
    _open: list[Span] = field(default_factory=list)

    def take(self) -> list[Span]:
        """Return the spans since the last call."""
        spans, self._spans = self._spans, []
        return spans

    @contextmanager
    def span(self, name: str, batch: Batch | None = None) -> Iterator[None]:
        """Record what runs inside of the block."""
        span = Span(name, self.now(), batch=batch)
        self._spans.append(span)
        self._open.append(span)
        try:
            yield
        finally:
            span.end = self.now()
            span.own += span.seconds
            self._open.pop()
            if self._open:
                self._open[-1].own -= span.seconds

    def wrap(
        self, owner: object, method: str, name: str, batch_of: Callable[..., Batch] | None = None
    ) -> None:
        """Record every call of one object's method; its class stays as it is.

        A call inside of a span with the same name belongs to that span.

        Args:
            name: of the spans.
            batch_of: makes the span's batch from the call's arguments.

        Raises:
            ViSpecError: there is no such method.
        """
        original = getattr(owner, method, None)
        if original is None:
            raise ViSpecError(
                f"{type(owner).__name__} has no {method}: this vLLM's steps cannot be split; "
                "profile with vLLM 0.32 or 0.33"
            )

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._open and self._open[-1].name == name:
                return original(*args, **kwargs)
            with self.span(name, batch_of(*args, **kwargs) if batch_of else None):
                return original(*args, **kwargs)

        setattr(owner, method, timed)


@dataclass(frozen=True)
class Step(Record):
    """One step of one engine.

    Attributes:
        kind: a name in `KINDS`.
        requests: in the batch.
        prompt_tokens, image_tokens: of the batch's prompts together; 0 in a decoding step.
        seconds: by part, see `columns`.
        wholes: seconds of what overlaps, see `WHOLES`.
    """

    kind: str
    requests: int
    prompt_tokens: int
    image_tokens: int
    seconds: dict[str, float]
    wholes: dict[str, float]

    @property
    def shape(self) -> tuple[str, int, int, int]:
        """What makes it comparable with another engine's."""
        return self.kind, self.requests, self.prompt_tokens, self.image_tokens


Block = list[tuple[Step, Step]]
"""Steps of one group of questions in one repetition: EAGLE's, and ViSpec's counterparts."""


@dataclass(frozen=True)
class Steps(Record):
    """The steps of an answer in order, and how many are not among them, by reason."""

    steps: tuple[Step, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)


def find_steps(spans: Sequence[Span], num_draft_tokens: int, concurrency: int) -> Steps:
    """Split every step of an answer.

    Args:
        spans: in the order of their begin, those of a step behind the step's own.
        concurrency: requests of a decoding step.
    """
    found: list[Step] = []
    left_out: Counter[str] = Counter()
    begins = [place for place, span in enumerate(spans) if span.name == STEP]
    for begin, end in zip(begins, [*begins[1:], len(spans)], strict=True):
        inside = spans[begin:end]
        batch = next((span.batch for span in inside if span.batch is not None), None)
        if batch is None or not batch.scheduled:
            continue
        kind = batch.kind(num_draft_tokens, concurrency)
        if kind is None:
            left_out[OTHER_BATCH] += 1
        elif (split := _split(inside, num_draft_tokens)) is None:
            left_out[INCOMPLETE] += 1
        else:
            sizes = len(batch.scheduled), sum(batch.prompts), batch.image_tokens
            found.append(Step(kind, *sizes, *split))
    return Steps(tuple(found), dict(left_out))


def _split(
    spans: Sequence[Span], num_draft_tokens: int
) -> tuple[dict[str, float], dict[str, float]] | None:
    """Return seconds by part and of the wholes; None if something is missing or too much."""
    named: defaultdict[str, list[Span]] = defaultdict(list)
    for span in spans:
        named[span.name].append(span)
    passes, logits = named[DRAFT_MODEL], named[DRAFT_LOGITS]
    if any(len(named[name]) != 1 for name in ONCE):
        return None
    # A published model's first pass drafts nothing; with the next one it opens the step.
    opening = len(passes) - num_draft_tokens + 1
    if len(logits) != num_draft_tokens or opening not in (1, 2):
        return None
    (step,), (propose,) = named[STEP], named[PROPOSE]
    wholes = {"first_pass": logits[0].end - propose.begin}
    if num_draft_tokens > 1:
        wholes["draft_step"] = (logits[-1].end - logits[0].end) / (num_draft_tokens - 1)
    wholes |= {"propose": propose.seconds, "step": step.seconds}
    parts = columns(num_draft_tokens)
    seconds = {name: sum((span.own for span in named[name]), 0.0) for name in parts}
    seconds[FIRST_PASS] = sum(one.own for one in passes[:opening])
    for number, later in enumerate(passes[opening:], start=1):
        seconds[f"{DRAFT_STEP}_{number}"] = later.own
    seconds[HOST] = step.seconds - sum(seconds.values())
    return seconds, wholes

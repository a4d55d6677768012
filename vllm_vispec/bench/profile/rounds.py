"""From spans to rounds: one step of the engine each, split into parts that add up to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from vllm_vispec.bench.profile import parts
from vllm_vispec.bench.profile.spans import Batch, Span
from vllm_vispec.bench.schema import Record

OTHER_BATCH, INCOMPLETE = "other batch", "incomplete"
ONCE = (parts.EXECUTE, parts.TARGET_MODEL, parts.TARGET_LOGITS, parts.SAMPLE, parts.PROPOSE)

Named = Mapping[str, Sequence[Span]]


class Shape(NamedTuple):
    """What makes rounds alike: their kind and batch; the tokens are those of the prompts."""

    kind: str
    requests: int
    prompt_tokens: int
    image_tokens: int


@dataclass(frozen=True)
class Round(Record):
    """One round of one side.

    Attributes:
        kind: a name in `parts.KINDS`.
        requests: in the batch.
        prompt_tokens, image_tokens: of the batch's prompts together; 0 in a decoding round.
        seconds: by part, see `parts.columns`.
        wholes: seconds of what overlaps, see `parts.WHOLES`.
    """

    kind: str
    requests: int
    prompt_tokens: int
    image_tokens: int
    seconds: dict[str, float]
    wholes: dict[str, float]

    @property
    def shape(self) -> Shape:
        """What makes it comparable with another side's."""
        return Shape(self.kind, self.requests, self.prompt_tokens, self.image_tokens)


@dataclass(frozen=True)
class Found(Record):
    """The rounds of an answer.

    Attributes:
        rounds: in order.
        left_out: how many are not among them, by reason.
    """

    rounds: tuple[Round, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """Which rounds count.

    Attributes:
        num_draft_tokens: K.
        concurrency: requests in a decoding round. Rounds of fewer, at the end of an answer, would
            mix sides that reach the end at different rounds.
    """

    num_draft_tokens: int
    concurrency: int

    def kind_of(self, batch: Batch) -> str | None:
        """Return the kind of a batch's round, None if it is of neither."""
        return next((kind for kind, fits in _FITS.items() if fits(batch, self)), None)


def find_rounds(spans: Sequence[Span], wanted: Wanted) -> Found:
    """Split every round of an answer.

    Args:
        spans: in the order of their begin, those of a round behind the round's own.
    """
    found: list[Round] = []
    left_out: Counter[str] = Counter()
    for step in _steps(spans):
        batch = next((span.batch for span in step if span.batch is not None), None)
        if batch is None or not batch.scheduled:
            continue
        kind = wanted.kind_of(batch)
        split = None if kind is None else split_round(step, kind, wanted.num_draft_tokens)
        if split is None:
            left_out[OTHER_BATCH if kind is None else INCOMPLETE] += 1
        else:
            found.append(_round(batch, *split, kind=str(kind)))
    return Found(tuple(found), dict(left_out))


def split_round(
    step: Sequence[Span], kind: str, num_draft_tokens: int
) -> tuple[dict[str, float], dict[str, float]] | None:
    """Return seconds by part and of the wholes; None if something is missing or too much."""
    named: dict[str, list[Span]] = {}
    for span in step:
        named.setdefault(span.name, []).append(span)
    passes = named.get(parts.DRAFT_MODEL, [])
    if any(len(named.get(name, ())) != 1 for name in ONCE):
        return None
    if not len(passes) == len(named.get(parts.DRAFT_LOGITS, ())) == num_draft_tokens:
        return None
    wholes = _wholes(named, num_draft_tokens)
    models = {parts.FIRST_PASS: passes[0].own}
    models |= {f"{parts.STEP}_{number}": span.own for number, span in enumerate(passes) if number}
    seconds = {
        name: models[name] if name in models else sum(span.own for span in named.get(part.span, ()))
        for name, part in parts.columns(kind, num_draft_tokens).items()
    }
    seconds[parts.HOST] = wholes["round"] - (sum(seconds.values()) - seconds[parts.HOST])
    return seconds, wholes


def _wholes(named: Named, num_draft_tokens: int) -> dict[str, float]:
    propose, logits = named[parts.PROPOSE][0], named[parts.DRAFT_LOGITS]
    steps = num_draft_tokens - 1
    found = {
        "first_pass": logits[0].end - propose.begin,
        "step": (logits[-1].end - logits[0].end) / steps if steps else 0.0,
        "propose": propose.seconds,
        "round": named[parts.ROUND][0].seconds,
    }
    return {name: found[name] for name in found if steps or name != "step"}


def _round(
    batch: Batch, seconds: dict[str, float], wholes: dict[str, float], *, kind: str
) -> Round:
    return Round(
        kind,
        len(batch.scheduled),
        sum(prompt.tokens for prompt in batch.prompts),
        sum(prompt.image_tokens for prompt in batch.prompts),
        seconds,
        wholes,
    )


def _steps(spans: Sequence[Span]) -> Iterator[Sequence[Span]]:
    """Yield the spans of every step of the engine."""
    starts = [place for place, span in enumerate(spans) if span.name == parts.ROUND]
    for start, stop in zip(starts, [*starts[1:], len(spans)], strict=True):
        yield spans[start:stop]


def _is_decode(batch: Batch, wanted: Wanted) -> bool:
    """Every request verifies K draft tokens, and all requests are there."""
    drafts = wanted.num_draft_tokens
    full = all(tokens == drafts + 1 for tokens in batch.scheduled)
    drafted = all(tokens == drafts for tokens in batch.drafted)
    return full and drafted and not batch.prompts and len(batch.scheduled) == wanted.concurrency


def _is_prefill(batch: Batch, wanted: Wanted) -> bool:
    """Every request enters, with its whole prompt."""
    whole = tuple(prompt.tokens for prompt in batch.prompts) == batch.scheduled
    return whole and not any(prompt.computed for prompt in batch.prompts)


_FITS: Mapping[str, Callable[[Batch, Wanted], bool]] = MappingProxyType(
    {parts.DECODE: _is_decode, parts.PREFILL: _is_prefill}
)

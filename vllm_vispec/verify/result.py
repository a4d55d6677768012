"""What `vispec verify` writes down as JSON, times in seconds; and what is noise, what a failure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_vispec.trees.settings import TreeSettings

SCHEMA_VERSION = 1
PASSED, FAILED, REFUSED = "passed", "failed", "refused"
PLAIN, CHAIN, TREE = "plain", "chain", "tree"
ALONE, TOGETHER = "alone", "together"


class Record(BaseModel):
    """Base of what is written down."""

    model_config = ConfigDict(frozen=True)


class Layers(Record):
    """Attention layers that are alike; sizes and heads are those of one worker.

    Attributes:
        padded_size: head size in the KV cache.
        kv_cache_dtype: the setting, and what the cache's tensor holds.
    """

    count: int
    backend: str
    head_size: int
    padded_size: int
    num_heads: int
    num_kv_heads: int
    kv_cache_dtype: str


class EngineState(Record):
    """What a running engine is made of, in vLLM's names, as its first worker sees it.

    Attributes:
        compilation: mode, backend and what `compilation_counter` counted.
        graphs: numbers of tokens of the CUDA graphs that were captured, by what replays them.
    """

    runner: str
    device_type: str
    device: str
    capability: str
    dtype: str
    target: tuple[Layers, ...]
    draft: tuple[Layers, ...]
    compilation: dict[str, Any]
    cudagraph_mode: str
    graphs: dict[str, tuple[int, ...]]


class Answer(Record):
    """One greedy answer.

    Attributes:
        top: plain vLLM's likeliest tokens at each position, with their logprobs.
        error: why there is none.
    """

    token_ids: tuple[int, ...] = ()
    top: tuple[dict[int, float], ...] = ()
    error: str | None = None

    def token(self, place: int) -> int:
        """Return a token; -1 behind the end."""
        return self.token_ids[place] if place < len(self.token_ids) else -1

    def first_difference(self, other: Answer) -> int | None:
        """Return the place of the first token that is not the other's."""
        longest = max(len(self.token_ids), len(other.token_ids))
        differing = (i for i in range(longest) if self.token(i) != other.token(i))
        return next(differing, None)


Answers = dict[str, dict[str, Answer]]
"""By batch, `ALONE` or `TOGETHER`, and the prompt's name."""


class Noise(Record):
    """How far plain vLLM differs from itself.

    Attributes:
        measured: largest change, from batch to batch, of the gap in logprob between the two
            likeliest tokens.
        rounding: two rounding steps of a logit of 16 in the target's dtype.
        differing: prompts that are answered otherwise alone than together.
    """

    measured: float
    rounding: float
    differing: int

    @property
    def limit(self) -> float:
        """The largest gap that still counts as noise."""
        return max(self.measured, self.rounding)


class Difference(Record):
    """The first token of an answer that is not plain vLLM's.

    Attributes:
        position: in the answer.
        expected, found: token ids; -1 behind the end.
        gap: how much likelier plain vLLM holds its own token, in logprob; None: than a token that
            is not among the likeliest.
    """

    prompt: str
    batch: str
    position: int
    expected: int
    found: int
    gap: float | None
    is_noise: bool


class Acceptance(Record):
    """vLLM's counters ``vllm:spec_decode_*`` over all answers; a tree's positions are levels."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: tuple[int, ...]

    @property
    def acceptance_length(self) -> float:
        """Accepted tokens of a draft, and the bonus token."""
        return 1 + self.num_accepted_tokens / max(self.num_drafts, 1)

    @property
    def rate_per_pos(self) -> tuple[float, ...]:
        """Share of drafts whose token at each position was accepted."""
        return tuple(n / max(self.num_drafts, 1) for n in self.num_accepted_tokens_per_pos)


class AttentionCase(Record):
    """What attention backends are asked for.

    Attributes:
        feature: chain, masked positions in the draft; or tree, node codes in the target.
        padded_size: the engine's.
        decode_rows: rows that each request decodes.
        tree: the setting.
    """

    feature: str
    head_size: int
    padded_size: int
    num_heads: int
    num_kv_heads: int
    decode_rows: int
    tree: TreeSettings = TreeSettings()


class AttentionError(Record):
    """How far a backend is from fp32 softmax.

    Attributes:
        used_size: head size it ran with, the engine's or the next that it serves.
        prompt, decode: largest error of prompts' and of decoding rows.
        reason: why it is not available.
        failure: what it raised.
    """

    case: AttentionCase
    backend: str
    used_size: int | None = None
    prompt: float | None = None
    decode: float | None = None
    reason: str | None = None
    failure: str | None = None

    @property
    def worst(self) -> float:
        """The larger error."""
        return max(self.prompt or 0.0, self.decode or 0.0)


class EngineResult(Record):
    """One engine: plain, chain or tree.

    Attributes:
        log: file with all that it said.
        timings: medians over decode steps of one request, the device waited for: `target_step` of
            `execute_model`; `draft_first_pass`; `draft_step` of each further pass; `steps` of how
            many.
        error: in one line, why it did not start or did not get through.
        is_refusal: vllm-vispec refuses the settings.
    """

    name: str
    log: str
    state: EngineState | None = None
    answers: Answers = {}
    acceptance: Acceptance | None = None
    timings: dict[str, float] = {}
    error: str | None = None
    is_refusal: bool = False


class Verdict(Record):
    """Whether a feature works here: passed, failed or refused, and why not, a line each."""

    feature: str
    state: str
    reasons: tuple[str, ...] = ()


class Verification(Record):
    """Everything on the page.

    Attributes:
        noise: None if plain vLLM did not answer.
        differences: by feature.
        tolerance: what attention may be off by.
    """

    schema_version: int = SCHEMA_VERSION
    command: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    engines: tuple[EngineResult, ...]
    noise: Noise | None
    differences: dict[str, tuple[Difference, ...]]
    attention: tuple[AttentionError, ...]
    tolerance: float
    verdicts: tuple[Verdict, ...]

    @property
    def exit_status(self) -> int:
        """0 only if nothing failed; a refusal is an answer."""
        return int(any(verdict.state == FAILED for verdict in self.verdicts))

    def to_markdown(self) -> str:
        """Return the page, the verdicts last."""
        from vllm_vispec.bench.pages import to_markdown

        counts = {engine.name: self._count_equal(engine) for engine in self.engines}
        return to_markdown("verify.md.j2", found=self, counts=counts)

    def _count_equal(self, engine: EngineResult) -> str:
        """Count a feature's answers; "" if there are none."""
        total = sum(len(answers) for answers in engine.answers.values())
        noise = [one.is_noise for one in self.differences.get(engine.name, ())]
        if not total:
            return ""
        return (
            f"{total - len(noise)} of {total} answers equal, {sum(noise)} differ within noise, "
            f"{len(noise) - sum(noise)} wrong"
        )


EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
TOLERANCE = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 3e-2}
"""Largest error of attention, whose outputs here reach 4; float32 leaves room for TF32."""
QUANTIZED_TOLERANCE = 0.5
FEWEST_DRAFTS = 20
SHIPPED_FIRST_TOKEN = {CHAIN: 0.55, TREE: 0.8}
"""Least share of first draft tokens accepted of the shipped pair; on a CPU 0.70 and 0.95."""


def tolerance(dtype: str, kv_cache_dtype: str) -> float:
    """Return what attention may be off by."""
    if kv_cache_dtype not in ("auto", *TOLERANCE):
        return QUANTIZED_TOLERANCE
    return TOLERANCE.get(dtype, TOLERANCE["bfloat16"])


def find_noise(plain: Answers, dtype: str) -> Noise:
    """Compare plain vLLM's answers alone and together, as far as they agree."""
    measured, differing = 0.0, 0
    for name, together in plain[TOGETHER].items():
        alone = plain[ALONE][name]
        place = alone.first_difference(together)
        differing += place is not None
        last = len(alone.top) if place is None else place + 1
        for one, other in zip(alone.top[:last], together.top, strict=False):
            first, second = sorted(one, key=one.__getitem__, reverse=True)[:2]
            if first in other and second in other:
                change = (one[first] - one[second]) - (other[first] - other[second])
                measured = max(measured, abs(change))
    rounding = 2 * 16.0 * EPSILON.get(dtype, EPSILON["bfloat16"])
    return Noise(measured=measured, rounding=rounding, differing=differing)


def find_differences(plain: Answers, other: Answers, noise: Noise) -> Iterator[Difference]:
    """Yield where a speculative engine's answers first differ from plain vLLM's."""
    for batch, answers in other.items():
        for name, answer in answers.items():
            own = plain[batch].get(name)
            place = None if own is None or answer.error else own.first_difference(answer)
            if own is None or place is None:
                continue
            expected, found = own.token(place), answer.token(place)
            top = own.top[place] if place < len(own.top) else {}
            gap = top[expected] - top[found] if {expected, found} <= top.keys() else None
            yield Difference(
                prompt=name,
                batch=batch,
                position=place,
                expected=expected,
                found=found,
                gap=gap,
                is_noise=gap is not None and gap <= noise.limit,
            )


def judge(
    engine: EngineResult,
    differences: Sequence[Difference],
    attention: Sequence[AttentionError],
    allowed: float,
    is_shipped_pair: bool = False,
) -> Verdict:
    """Return the verdict on a chain or tree; a tree that is refused has not failed.

    It fails if

    - its engine does not start, or does not answer a prompt that plain vLLM answers;
    - a token differs from plain vLLM's where plain vLLM's gap between the two is above its noise;
    - no draft token at all is accepted, or too few first ones of the shipped pair;
    - a backend's attention, asked for what the feature needs, is off by more than ``allowed``, or
      fails although the engine uses it.
    """
    if engine.is_refusal and engine.name == TREE:
        return Verdict(feature=TREE, state=REFUSED, reasons=(str(engine.error),))
    reasons = (
        *([] if engine.error is None else [engine.error]),
        *_wrong_answers(engine, differences),
        *_low_acceptance(engine, is_shipped_pair),
        *_wrong_attention(engine, attention, allowed),
    )
    return Verdict(feature=engine.name, state=FAILED if reasons else PASSED, reasons=reasons)


def _wrong_answers(engine: EngineResult, differences: Sequence[Difference]) -> Iterator[str]:
    for name, answer in engine.answers.get(ALONE, {}).items():
        if answer.error is not None:
            yield f"no answer: {name}: {answer.error}"
    for one in differences:
        if not one.is_noise:
            gap = "much likelier" if one.gap is None else f"likelier by {one.gap:.3g}"
            yield (
                f"wrong token: {one.prompt} ({one.batch}), position {one.position}: {one.found} "
                f"instead of {one.expected}, which plain vLLM holds {gap}"
            )


def _low_acceptance(engine: EngineResult, is_shipped_pair: bool) -> Iterator[str]:
    found = engine.acceptance
    if found is None or found.num_drafts < FEWEST_DRAFTS:
        return
    first, least = found.rate_per_pos[0], SHIPPED_FIRST_TOKEN[engine.name]
    if found.num_accepted_tokens == 0:
        yield f"acceptance: none of {found.num_draft_tokens} draft tokens was accepted"
    elif is_shipped_pair and first < least:
        yield f"acceptance: {first:.2f} of first draft tokens; the shipped pair reaches {least}"


def _wrong_attention(
    engine: EngineResult, attention: Sequence[AttentionError], allowed: float
) -> Iterator[str]:
    layers = () if engine.state is None else (*engine.state.target, *engine.state.draft)
    used = {layer.backend for layer in layers}
    for one in attention:
        if one.case.feature != engine.name:
            continue
        if one.worst > allowed:
            yield (
                f"attention: {one.backend} with heads of {one.used_size} is off by "
                f"{one.worst:.2g}, more than {allowed:g}"
            )
        elif one.failure is not None and one.backend in used:
            yield f"attention: {one.backend}, which this engine uses: {one.failure}"

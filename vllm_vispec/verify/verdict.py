"""The rules: what is noise, what is a failure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vllm_vispec.verify.result import (
    CHAIN,
    FAILED,
    PASSED,
    REFUSED,
    Answer,
    AttentionError,
    Difference,
    EngineResult,
    Noise,
    Verdict,
)

ALONE, TOGETHER = "alone", "together"
BATCHES = (ALONE, TOGETHER)
_EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_LOGIT = 16.0
"""Two logits of this size, each off by one rounding step, move their gap by `Noise.rounding`."""
TOLERANCE = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 3e-2}
"""Largest error of an attention backend, of outputs of about 3; float32 leaves room for TF32."""
QUANTIZED_TOLERANCE = 0.25
FEWEST_DRAFTS = 20
SHIPPED_FIRST_TOKEN = {"chain": 0.55, "tree": 0.8}
"""Least share of first draft tokens accepted of the shipped pair; on a CPU 0.70 and 0.95."""

Answers = Mapping[str, Mapping[str, Answer]]


def tolerance(dtype: str, kv_cache_dtype: str) -> float:
    """Return what an attention backend may be off by."""
    quantized = kv_cache_dtype not in ("auto", *TOLERANCE)
    return QUANTIZED_TOLERANCE if quantized else TOLERANCE.get(dtype, TOLERANCE["bfloat16"])


def find_noise(plain: Answers, dtype: str) -> Noise:
    """Compare plain vLLM's answers to prompts alone and together, as far as they agree."""
    measured, differing = 0.0, 0
    for name, alone in plain[ALONE].items():
        together = plain[TOGETHER].get(name)
        if together is None:
            continue
        same = _first_difference(alone.token_ids, together.token_ids)
        differing += same is not None
        last = len(alone.top) if same is None else same + 1
        for one, other in zip(alone.top[:last], together.top[:last], strict=False):
            first, second = sorted(one, key=one.__getitem__, reverse=True)[:2]
            if first in other and second in other:
                change = (one[first] - one[second]) - (other[first] - other[second])
                measured = max(measured, abs(change))
    epsilon = _EPSILON.get(dtype, _EPSILON["bfloat16"])
    return Noise(measured, 2 * _LOGIT * epsilon, differing)


def find_differences(plain: Answers, other: Answers, noise: Noise) -> Iterator[Difference]:
    """Yield where a speculative engine's answers first differ from plain vLLM's."""
    for batch in BATCHES:
        for name, expected in plain[batch].items():
            found = other.get(batch, {}).get(name)
            if found is None or found.error is not None:
                continue
            position = _first_difference(expected.token_ids, found.token_ids)
            if position is not None:
                yield _difference(name, batch, position, expected, found, noise)


def _difference(
    name: str, batch: str, position: int, expected: Answer, found: Answer, noise: Noise
) -> Difference:
    tokens = _token(expected, position), _token(found, position)
    # Where one answer ends the other goes on, and there are no logprobs to look up.
    top = expected.top[position] if position < len(expected.top) else {}
    own, other = top.get(tokens[0]), top.get(tokens[1])
    if own is None:
        gap, is_least = float("inf"), False
    else:
        gap = own - (min(top.values()) if other is None else other)
        is_least = other is None
    is_noise = not is_least and gap <= noise.limit
    return Difference(name, batch, position, *tokens, gap, is_least, is_noise)


def _token(answer: Answer, position: int) -> int:
    return answer.token_ids[position] if position < len(answer.token_ids) else -1


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    pairs = zip(one, other, strict=False)
    found = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
    return min(len(one), len(other)) if found is None and len(one) != len(other) else found


def judge(
    engine: EngineResult,
    differences: Sequence[Difference],
    attention: Sequence[AttentionError],
    allowed: float,
    is_shipped_pair: bool = False,
) -> Verdict:
    """Return the verdict on a feature.

    It fails if its engine does not start or does not answer; if an answer differs where plain
    vLLM's gap is larger than its noise; if none of the draft tokens is accepted (of the shipped
    pair's first ones: too few); or if a backend's attention is wrong. A tree may be refused.

    Args:
        engine: the feature's.
        attention: all errors; those of other features are passed over.
        allowed: the largest error.
    """
    if engine.is_refusal and engine.name != CHAIN:
        return Verdict(engine.name, REFUSED, (engine.error or "",))
    reasons = [] if engine.error is None else [engine.error]
    reasons += _wrong_tokens(differences)
    reasons += _unanswered(engine)
    reasons += _acceptance(engine, is_shipped_pair)
    reasons += _attention(engine, attention, allowed)
    return Verdict(engine.name, FAILED if reasons else PASSED, tuple(reasons))


def _wrong_tokens(differences: Sequence[Difference]) -> Iterator[str]:
    for one in differences:
        if not one.is_noise:
            yield (
                f"wrong token: {one.prompt} ({one.batch}), position {one.position}: {one.found} "
                f"instead of {one.expected}, which plain vLLM holds likelier by "
                f"{'more than ' if one.gap_is_least else ''}{one.gap:.3g}"
            )


def _unanswered(engine: EngineResult) -> Iterator[str]:
    for batch, answers in (engine.answers or {}).items():
        for name, answer in answers.items():
            if answer.error is not None:
                yield f"no answer: {name} ({batch}): {answer.error}"


def _acceptance(engine: EngineResult, is_shipped_pair: bool) -> Iterator[str]:
    found = engine.acceptance
    if found is None or found.num_drafts < FEWEST_DRAFTS:
        return
    first = found.rate_per_pos[0] if found.rate_per_pos else 0.0
    if found.num_accepted_tokens == 0:
        yield f"acceptance: none of {found.num_draft_tokens} draft tokens was accepted"
    elif is_shipped_pair and first < (least := SHIPPED_FIRST_TOKEN[engine.name]):
        yield (
            f"acceptance: {first:.2f} of the first draft tokens, less than {least}, which the "
            "shipped pair reaches on a CPU"
        )


def _attention(
    engine: EngineResult, attention: Sequence[AttentionError], allowed: float
) -> Iterator[str]:
    layers = () if engine.state is None else (*engine.state.target, *engine.state.draft)
    used = {layer.backend for layer in layers}
    for one in attention:
        if one.case.feature != engine.name:
            continue
        if not one.worst <= allowed:
            yield (
                f"attention: {one.backend} with heads of {one.used_size} is off by "
                f"{one.worst:.2g}, more than {allowed:g}"
            )
        elif one.failure is not None and one.backend in used:
            yield f"attention: {one.backend}, which this engine uses: {one.failure}"

"""The rules: what is noise, what is a failure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vllm_vispec.verify.result import (
    ALONE,
    BATCHES,
    FAILED,
    PASSED,
    REFUSED,
    TOGETHER,
    TREE,
    Answer,
    Answers,
    AttentionError,
    Difference,
    EngineResult,
    Noise,
    Verdict,
)

EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
TOLERANCE = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 3e-2}
"""Largest error of attention, whose outputs here reach 4; float32 leaves room for TF32."""
QUANTIZED_TOLERANCE = 0.5
FEWEST_DRAFTS = 20
SHIPPED_FIRST_TOKEN = {"chain": 0.55, "tree": 0.8}
"""Least share of first draft tokens accepted of the shipped pair; on a CPU 0.70 and 0.95."""
_LIKE_THE_TARGET = ("auto", *TOLERANCE)


def tolerance(dtype: str, kv_cache_dtype: str) -> float:
    """Return what attention may be off by."""
    is_quantized = kv_cache_dtype not in _LIKE_THE_TARGET
    return QUANTIZED_TOLERANCE if is_quantized else TOLERANCE.get(dtype, TOLERANCE["bfloat16"])


def find_noise(plain: Answers, dtype: str) -> Noise:
    """Compare plain vLLM's answers alone and together, as far as they agree."""
    measured, differing = 0.0, 0
    for name, together in plain[TOGETHER].items():
        alone = plain[ALONE][name]
        place = _first_difference(alone.token_ids, together.token_ids)
        differing += place is not None
        last = len(alone.top) if place is None else place + 1
        for one, other in zip(alone.top[:last], together.top, strict=False):
            first, second = sorted(one, key=one.__getitem__, reverse=True)[:2]
            if first in other and second in other:
                change = (one[first] - one[second]) - (other[first] - other[second])
                measured = max(measured, abs(change))
    return Noise(measured, 2 * 16.0 * EPSILON.get(dtype, EPSILON["bfloat16"]), differing)


def find_differences(plain: Answers, other: Answers, noise: Noise) -> Iterator[Difference]:
    """Yield where a speculative engine's answers first differ from plain vLLM's."""
    for batch in BATCHES:
        for name, found in other.get(batch, {}).items():
            expected = plain[batch].get(name)
            if expected is None or found.error is not None:
                continue
            place = _first_difference(expected.token_ids, found.token_ids)
            if place is not None:
                tokens = _token(expected, place), _token(found, place)
                gap = _gap(expected.top[place] if place < len(expected.top) else {}, *tokens)
                is_noise = gap is not None and gap <= noise.limit
                yield Difference(name, batch, place, *tokens, gap, is_noise)


def _gap(top: Mapping[int, float], expected: int, found: int) -> float | None:
    return top[expected] - top[found] if expected in top and found in top else None


def _token(answer: Answer, place: int) -> int:
    return answer.token_ids[place] if place < len(answer.token_ids) else -1


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    pairs = enumerate(zip(one, other, strict=False))
    behind = min(len(one), len(other)) if len(one) != len(other) else None
    return next((place for place, (a, b) in pairs if a != b), behind)


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
        return Verdict(engine.name, REFUSED, (str(engine.error),))
    reasons = [
        *([] if engine.error is None else [engine.error]),
        *_unanswered(engine),
        *_wrong_tokens(differences),
        *_acceptance(engine, is_shipped_pair),
        *_attention(engine, attention, allowed),
    ]
    return Verdict(engine.name, FAILED if reasons else PASSED, tuple(reasons))


def _unanswered(engine: EngineResult) -> Iterator[str]:
    for name, answer in engine.answers.get(ALONE, {}).items():
        if answer.error is not None:
            yield f"no answer: {name}: {answer.error}"


def _wrong_tokens(differences: Sequence[Difference]) -> Iterator[str]:
    for one in differences:
        if not one.is_noise:
            gap = "much likelier" if one.gap is None else f"likelier by {one.gap:.3g}"
            yield (
                f"wrong token: {one.prompt} ({one.batch}), position {one.position}: {one.found} "
                f"instead of {one.expected}, which plain vLLM holds {gap}"
            )


def _acceptance(engine: EngineResult, is_shipped_pair: bool) -> Iterator[str]:
    found = engine.acceptance
    if found is None or found.num_drafts < FEWEST_DRAFTS:
        return
    first, least = found.rate_per_pos[0], SHIPPED_FIRST_TOKEN[engine.name]
    if found.num_accepted_tokens == 0:
        yield f"acceptance: none of {found.num_draft_tokens} draft tokens was accepted"
    elif is_shipped_pair and first < least:
        yield f"acceptance: {first:.2f} of first draft tokens; the shipped pair reaches {least}"


def _attention(
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

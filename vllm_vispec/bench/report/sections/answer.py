"""The answer in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_vispec.bench.intervals import Measured
from vllm_vispec.bench.report.blocks import Block, Inline, Line, Paragraph, Strong
from vllm_vispec.bench.report.facts import Facts, Row, slice_of, temperature_text
from vllm_vispec.bench.report.sections.base import Section, interval_text, number, share

NAMES = {"vispec": "ViSpec", "eagle": "vLLM's EAGLE", "ngram": "n-gram lookup"}


def build(facts: Facts) -> Sequence[Block]:
    """One sentence: how fast, how sure, how equal, and up to which load."""
    if facts.main is None:
        return ()
    return (Paragraph(_sentence(facts, facts.main), lead=True),)


def _sentence(facts: Facts, row: Row) -> Line:
    key = row.key
    where = (
        f"With {NAMES.get(key.side, key.side)}, K = {key.num_speculative_tokens}"
        f"{_chosen(facts, row)}, "
        f"{temperature_text(key.temperature)}, at concurrency {key.concurrency} on {key.dataset}, "
    )
    parts: tuple[Inline, ...] = (where, *_speed(row.interval("decode_speedup")))
    return (*parts, ", ", _outputs(row), _load(facts, row), ".")


def _chosen(facts: Facts, row: Row) -> str:
    """Whether K was chosen by its result; nothing where there was no choice."""
    rows = facts.find(**slice_of(row.key, "num_speculative_tokens"))
    found = {
        one.key.num_speculative_tokens: value
        for one in rows
        if (value := one.value("decode_speedup")) is not None
    }
    if len(found) < 2:
        return ""
    best = max(found, key=lambda k: found[k])
    if best == row.key.num_speculative_tokens:
        return f" (the fastest of {len(found)})"
    return f" (of {len(found)}, the fastest being {best} with {found[best]:.2f}x)"


def _speed(found: Measured) -> tuple[Inline, ...]:
    value = found.value if isinstance(found.value, float) else 0.0
    interval = interval_text(found).replace("(", "(95 %: ")
    unsure = isinstance(found.low, float) and isinstance(found.high, float)
    if unsure and found.low <= 1 <= found.high:  # type: ignore[operator]
        return (
            "decoding is neither faster nor slower than plain vLLM beyond the noise of this run, ",
            Strong(f"{value:.2f}x{interval}"),
        )
    verb = "is" if value >= 1 else "is only"
    return (f"decoding {verb} ", Strong(f"{value:.2f}x{interval}"), " as fast as with plain vLLM")


def _outputs(row: Row) -> str:
    identical = row.value("identical_outputs")
    lengths = (
        f"{number(row.value('mean_output_tokens'))} output tokens on average against "
        f"{number(row.plain_value('mean_output_tokens'))}"
    )
    if identical is None:
        return f"outputs are not comparable one by one, with {lengths}"
    return f"with {share(identical)} of the outputs identical and {lengths}"


def _load(facts: Facts, row: Row) -> str:
    """Up to which concurrency it gains; nothing where one was measured."""
    rows = facts.find(**slice_of(row.key, "concurrency"))
    found = sorted(
        (one.key.concurrency, value)
        for one in rows
        if (value := one.value("decode_speedup")) is not None
    )
    if len(found) < 2:
        return ""
    losing = [concurrency for concurrency, value in found if value < 1]
    if not losing:
        return f"; it gains at every concurrency measured, up to {found[-1][0]}"
    worst, low = min(found, key=lambda one: one[1])
    gaining = [concurrency for concurrency, _ in found if concurrency < losing[0]]
    reach = f"it gains up to concurrency {gaining[-1]} and " if gaining else "it "
    return f"; {reach}falls to {low:.2f}x at {worst}"


ANSWER = Section(
    "answer",
    "Answer",
    build,
    "No answer: this run has no cell in which the draft in question and plain vLLM both answered.",
)

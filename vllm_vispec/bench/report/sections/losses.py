"""Where drafting loses, and the setting that limits the loss."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence

from vllm_vispec.bench.estimate.schedule import Schedule, best_schedule
from vllm_vispec.bench.report.blocks import Block, Bullets, Code, Line, Paragraph, Table
from vllm_vispec.bench.report.facts import OURS, Facts, Row, slice_of
from vllm_vispec.bench.report.sections.base import (
    SPEEDUP_HEAD,
    Section,
    number,
    point_text,
    speedup_cells,
)

SETTING = "num_speculative_tokens_per_batch_size"
LATE_FIRST_TOKEN = 1.05
MOST_ROWS = 40


def build(facts: Facts) -> Sequence[Block]:
    """Cells below 1.0, the schedule of K that avoids them, and other losses."""
    rows = [row for row in facts.find(side=facts.side) if row.value("decode_speedup") is not None]
    if not rows:
        return ()
    losing = [row for row in rows if _loses(row)]
    others = [line for line in (_late(rows), _different(rows), _failing(rows)) if line]
    blocks: list[Block] = [_verdict(facts.side, rows, losing)]
    if losing:
        blocks.append(_table(facts, losing))
        blocks.append(Paragraph(_remedy(facts, losing[0])))
    return (*blocks, Bullets(tuple(others))) if others else blocks


def _loses(row: Row) -> bool:
    speeds = (row.value("decode_speedup"), row.value("e2e_speedup"))
    return any(speed is not None and speed < 1 for speed in speeds)


def _verdict(side: str, rows: Sequence[Row], losing: Sequence[Row]) -> Paragraph:
    if not losing:
        low = min(rows, key=lambda row: row.value("decode_speedup") or 0.0)
        return Paragraph(
            f"{side} is slower than plain vLLM in none of the {len(rows)} cells measured; its "
            f"lowest decode_speedup is {low.value('decode_speedup'):.2f} at {point_text(low.key)} "
            f"(row {low.number})."
        )
    shown = "" if len(losing) <= MOST_ROWS else f", the first {MOST_ROWS} of them here"
    return Paragraph(
        f"{side} is slower than plain vLLM, decoding or as a whole, in {len(losing)} of the "
        f"{len(rows)} cells measured{shown}."
    )


def _table(facts: Facts, losing: Sequence[Row]) -> Table:
    head: tuple[Line, ...] = ("where", "beyond noise", "what limits the loss", *SPEEDUP_HEAD, "row")
    body = [
        (
            point_text(row.key),
            _certainty(row),
            _limit(facts, row),
            *speedup_cells(row),
            str(row.number),
        )
        for row in losing[:MOST_ROWS]
    ]
    return Table(head, tuple(body), text_columns=3)


def _certainty(row: Row) -> str:
    found = row.interval("decode_speedup")
    if not isinstance(found.high, float):
        return "not known"
    return "yes" if found.high < 1 else "no"


def _limit(facts: Facts, row: Row) -> str:
    """What other K do at the same point."""
    others = facts.find(**slice_of(row.key, "num_speculative_tokens"))
    found = {
        one.key.num_speculative_tokens: value
        for one in others
        if (value := one.value("decode_speedup")) is not None
    }
    best = max(sorted(found), key=lambda k: found[k])
    if found[best] <= 1:
        return "K = 0 at this load: no K that was measured gains"
    if best == row.key.num_speculative_tokens:
        return "fewer requests at once, or longer answers: decoding gains, the prefill takes more"
    return f"K = {best} at this load, with {found[best]:.2f}"


def _remedy(facts: Facts, row: Row) -> Line:
    schedule = _schedule(facts, row)
    highest = max(k for _, _, k in schedule)
    if not highest:
        return "No load was measured here at which drafting gains: serve without it."
    config = {
        "method": facts.side,
        **({"model": facts.run.settings.get("head") or "HEAD"} if facts.side == OURS else {}),
        "num_speculative_tokens": highest,
        SETTING: [list(entry) for entry in schedule],
    }
    return (
        "The setting is ",
        Code(SETTING),
        ": K by the number of running requests, 0 for none. From the cells at "
        f"{point_text(row.key, 'num_speculative_tokens', 'concurrency')}, each concurrency with "
        "its fastest K: ",
        Code(f"--speculative-config '{json.dumps(config)}'"),
        ". A schedule was not measured itself unless a row says so; ",
        Code("vispec bench tune"),
        " measures one on your machine. vLLM ignores it with data parallelism.",
    )


def _schedule(facts: Facts, row: Row) -> Schedule:
    speedups: dict[int, dict[int, float]] = defaultdict(dict)
    for one in facts.find(**slice_of(row.key, "num_speculative_tokens", "concurrency")):
        value = one.value("decode_speedup")
        if value is not None:
            speedups[one.key.concurrency][one.key.num_speculative_tokens] = value
    return best_schedule(speedups)


def _late(rows: Sequence[Row]) -> Line | None:
    """Cells whose first token comes clearly later; no setting changes that."""
    found: Mapping[int, tuple[float, Row]] = {
        row.number: (ratio, row)
        for row in rows
        if (ratio := row.value("ttft_ratio")) is not None and ratio > LATE_FIRST_TOKEN
    }
    if not found:
        return None
    worst, row = max(found.values(), key=lambda one: one[0])
    return (
        f"The first token comes more than {LATE_FIRST_TOKEN - 1:.0%} later than without drafting "
        f"in {len(found)} of {len(rows)} cells, at worst {worst:.2f}x at {point_text(row.key)} "
        f"(row {row.number}). It is the draft's own prefill; shorter prompts and fewer image "
        "tokens limit it, no setting of the draft does."
    )


def _different(rows: Sequence[Row]) -> Line | None:
    """Greedy cells with outputs that differ from plain vLLM's."""
    found = [
        (value, row)
        for row in rows
        if (value := row.value("identical_outputs")) is not None and value < 1
    ]
    if not found:
        return None
    worst, row = min(found, key=lambda one: one[0])
    return (
        f"Greedy outputs differ from plain vLLM's in {len(found)} of {len(rows)} cells, at most "
        f"{number(100 * (1 - worst))} % of them at {point_text(row.key)} (row {row.number}). Two "
        "runs of plain vLLM can differ in the same way, when batches of another size round "
        "otherwise and two tokens are nearly tied."
    )


def _failing(rows: Sequence[Row]) -> Line | None:
    """Cells in which single requests failed."""
    found = [row for row in rows if (row.value("failed_requests") or 0) > 0]
    if not found:
        return None
    numbers = ", ".join(str(row.number) for row in found)
    return f"Requests failed in {len(found)} of {len(rows)} cells (rows {numbers})."


LOSSES = Section(
    "losses",
    "Where it loses, and what limits the loss",
    build,
    "Not known: no speedup could be computed.",
)

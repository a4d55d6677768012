"""What was measured, as the cost model reads it: run folders and results of `decode-speed`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from vllm_vispec.bench.schema import BenchRun, CellKey, CellResult
from vllm_vispec.errors import ViSpecError

PLAIN = "plain"


@dataclass(frozen=True)
class MeasuredCell:
    """What one cell of a run says about decoding.

    Attributes:
        batch: sequences decoded at once; of a run, the concurrency.
        num_speculative_tokens: 0 for plain decoding.
        context: mean tokens per sequence, half of the answer included.
        acceptance: share of rounds that accept each position; empty for plain decoding.
        seconds_per_token: decode seconds per output token of one sequence.
        group: cells of one group were measured side by side (of a run, its K).
    """

    batch: int
    num_speculative_tokens: int
    context: float
    acceptance: tuple[float, ...]
    seconds_per_token: float
    group: int = 0


def measured_cells(run: BenchRun, side: str) -> tuple[MeasuredCell, ...]:
    """Take the plain cells and those of a side out of a run; repetitions are pooled.

    Failed cells and failed requests are left out, and so are cells in which nothing was decoded.
    """
    pools: dict[CellKey, list[CellResult]] = defaultdict(list)
    for cell in run.cells:
        if cell.key.side in (PLAIN, side) and cell.error is None:
            pools[cell.key].append(cell)
    found = [_measured(key, pool) for key, pool in pools.items()]
    return tuple(cell for cell in found if cell is not None)


def _measured(key: CellKey, pool: Sequence[CellResult]) -> MeasuredCell | None:
    requests = [
        one for cell in pool for one in cell.requests if one.error is None and one.output_tokens > 1
    ]
    seconds = sum(one.decode_s for one in requests)
    if seconds <= 0:
        return None
    acceptance: tuple[float, ...] = ()
    if key.side != PLAIN:
        spec = [cell.spec for cell in pool if cell.spec is not None]
        rounds = sum(one.rounds for one in spec)
        if not rounds:
            return None
        by_position = zip(*(one.accepted_by_position for one in spec), strict=True)
        acceptance = tuple(sum(counts) / rounds for counts in by_position)
    return MeasuredCell(
        batch=key.concurrency,
        num_speculative_tokens=0 if key.side == PLAIN else key.num_speculative_tokens,
        context=mean(one.prompt_tokens + one.output_tokens / 2 for one in requests),
        acceptance=acceptance,
        seconds_per_token=seconds / sum(one.output_tokens - 1 for one in requests),
        group=key.num_speculative_tokens,
    )


def read_measured(path: Path, side: str, context: float | None = None) -> list[MeasuredCell]:
    """The cells of a run folder, or of a result file of `python -m benchmarks decode-speed`.

    Args:
        side: of a run folder, what is compared with plain decoding.
        context: tokens per sequence; of a result file only, which does not tell.

    Raises:
        ViSpecError: nothing usable is there.
    """
    if path.is_dir():
        cells = list(measured_cells(BenchRun.load(path), side))
        if not any(cell.num_speculative_tokens for cell in cells):
            raise ViSpecError(f"{path} has no finished cell of --side {side}: name one it has")
        return cells
    if context is None:
        raise ViSpecError(f"{path} does not tell the tokens per sequence: give --context")
    return _of_results(path, context)


def _of_results(path: Path, context: float) -> list[MeasuredCell]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        return [cell for one in results for cell in _of_result(one, context)]
    except OSError as error:
        raise ViSpecError(
            f"{path} cannot be read ({error.strerror}): give a run folder or a result file"
        ) from error
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ViSpecError(
            f"{path} is no result of `python -m benchmarks decode-speed` ({error!r}): give one, or "
            "the folder of a `vispec bench run`"
        ) from error


def _of_result(one: Mapping[str, Any], context: float) -> tuple[MeasuredCell, MeasuredCell]:
    k = int(one["num_speculative_tokens"])
    plain = 1 / float(one["plain_tokens_per_second"])
    ours = 1 / float(one["vispec_tokens_per_second"])
    return (
        MeasuredCell(1, 0, context, (), plain, k),
        MeasuredCell(1, k, context, tuple(one["accepted_at"]), ours, k),
    )


HoldOut = Callable[[MeasuredCell], bool]
_HOLD_OUTS: Mapping[str, Callable[[MeasuredCell], int]] = {
    "batch": lambda cell: cell.batch,
    # The plain cells that were measured beside it, too.
    "k": lambda cell: cell.group or cell.num_speculative_tokens,
}
EVERY_THIRD = "every-third"


def hold_out(text: str) -> HoldOut | None:
    """What `--hold-out` means: "batch=16,32", "k=5", or `EVERY_THIRD` (None).

    Raises:
        ViSpecError: it is none of these.
    """
    if text == EVERY_THIRD:
        return None
    name, _, values = text.partition("=")
    try:
        wanted = {int(value) for value in values.split(",")}
        axis = _HOLD_OUTS[name]
    except (KeyError, ValueError) as error:
        raise ViSpecError(
            f"--hold-out {text} is not understood: use {EVERY_THIRD}, batch=16,32 or k=5"
        ) from error
    return lambda cell: axis(cell) in wanted

"""K by batch size: vLLM's `num_speculative_tokens_per_batch_size`, chosen, read and written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StrictInt, TypeAdapter, ValidationError

from vllm_vispec.utils.errors import ViSpecError

SETTING = "num_speculative_tokens_per_batch_size"
K_SETTING = "num_speculative_tokens"
FORM = (
    "give [[first batch size, last batch size, K], ...], beginning at 1, in order and without "
    "overlap, as JSON or as a file of it"
)

Ranges = tuple[tuple[int, int, int], ...]
"""(first batch size, last batch size, K), in order; vLLM goes on with the last K."""
_Size = Annotated[StrictInt, Field(ge=1)]
_RANGES = TypeAdapter(list[tuple[_Size, _Size, Annotated[StrictInt, Field(ge=0)]]])


def as_schedule(given: Any) -> Ranges:
    """Return a schedule, from JSON, from a file of JSON, or as it is; nothing is none.

    Args:
        given: a list of ranges; or as text such a list, a speculative config, or what `vispec bench
            tune` writes; or the path of a file with one of these.

    Raises:
        ViSpecError: it is none of these, or not a schedule that vLLM takes.
    """
    if not given:
        return ()
    if not isinstance(given, str):
        return check_ranges(given)
    text = given.strip()
    if not text.startswith(("[", "{")):
        try:
            text = Path(given).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise ViSpecError(
                f"--schedule {given} cannot be read ({error.strerror or error}): {FORM}"
            ) from error
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ViSpecError(f"--schedule {given} is not JSON ({error}): {FORM}") from error
    if isinstance(content, Mapping):
        k = content.get(K_SETTING)
        found = (content.get("schedule"), content.get(SETTING), k and [[1, 1, k]])
        content = next((one for one in found if one is not None), None)
    return check_ranges(content)


def check_ranges(value: Any) -> Ranges:
    """Return a schedule if vLLM takes it and it drafts at some batch size.

    Raises:
        ViSpecError: it does not, with the form that is wanted.
    """
    shown = f"--schedule {json.dumps(value)}"
    ranges: Ranges = ()
    with suppress(ValidationError):
        ranges = tuple(_RANGES.validate_python(value))
    if not ranges or any(first > last for first, last, _ in ranges):
        raise ViSpecError(f"{shown} is not a list of ranges: {FORM}")
    if ranges[0][0] != 1 or any(later[0] <= earlier[1] for earlier, later in pairwise(ranges)):
        raise ViSpecError(f"{shown} does not begin at 1 or overlaps: {FORM}")
    if not highest(ranges):
        raise ViSpecError(
            f"{shown} drafts at no batch size: leave the variant out, plain vLLM is what it says"
        )
    return ranges


def highest(ranges: Iterable[tuple[int, int, int]]) -> int:
    """Return the largest K."""
    return max(k for _, _, k in ranges)


def speculative_config(
    draft: Mapping[str, Any], ranges: Iterable[tuple[int, int, int]]
) -> dict[str, Any] | None:
    """Return vLLM's speculative config with a schedule; None if nothing is ever drafted.

    A schedule of a single K is written without ranges: vLLM 0.32 and 0.33 give up full CUDA
    graphs on the V1 runner for the sake of a schedule.

    Args:
        draft: method and model.
    """
    ranges = tuple(ranges)
    if not highest(ranges):
        return None
    config = {**draft, K_SETTING: highest(ranges)}
    if len({k for _, _, k in ranges}) > 1:
        config[SETTING] = [list(entry) for entry in ranges]
    elif draft["method"] == "vispec" and "tree" not in draft:
        config.setdefault("adaptive", False)  # else K follows load and acceptance
    return config


def best_schedule(speedups: Mapping[int, Mapping[int, float]]) -> Ranges:
    """Choose the fastest K for every batch size, 0 where none is faster than plain vLLM.

    Of two equally fast K the smaller one is chosen.

    Args:
        speedups: batch size -> K -> decode_speedup, measured or estimated.
    """
    best = [
        (batch, max(sorted(found), key=found.__getitem__))
        for batch, found in sorted(speedups.items())
        if found
    ]
    return merged_ranges([(batch, k if speedups[batch][k] > 1 else 0) for batch, k in best])


def merged_ranges(chosen: Sequence[tuple[int, int]], midway: bool = False) -> Ranges:
    """Turn the K of single batch sizes into ranges, neighbours with the same K into one.

    A range reaches up to the next batch size; behind the last one vLLM goes on with the last K.

    Args:
        chosen: (batch size, K) in order.
        midway: let a range end midway to the next batch size (geometrically) instead of just
            below it: under a load of 8 some steps run 7 requests, which should not count as 4.
    """
    merged: list[tuple[int, int, int]] = []
    for index, (batch, k) in enumerate(chosen):
        last = batch
        if index + 1 < len(chosen):
            following = chosen[index + 1][0]
            border = max(batch + 1, round(sqrt(batch * following))) if midway else following
            last = border - 1
        if merged and merged[-1][2] == k:
            merged[-1] = (merged[-1][0], last, k)
        else:
            merged.append((merged[-1][1] + 1 if merged else 1, last, k))
    return tuple(merged)

"""K by batch size: vLLM's `num_speculative_tokens_per_batch_size`, read and written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from vllm_vispec.utils.errors import ViSpecError

SETTING = "num_speculative_tokens_per_batch_size"
K_SETTING = "num_speculative_tokens"
FORM = (
    "give [[first batch size, last batch size, K], ...], beginning at 1, in order and without "
    "overlap, as JSON or as a file of it"
)

Ranges = tuple[tuple[int, int, int], ...]
"""(first batch size, last batch size, K), in order; vLLM goes on with the last K."""


def read_schedule(given: str) -> Ranges:
    """Read a schedule from JSON or from a file of JSON.

    Args:
        given: a list of ranges, a speculative config, or what `vispec bench tune` writes; or the
            path of a file with one of these.

    Raises:
        ViSpecError: it is none of these, or not a schedule that vLLM takes.
    """
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
    return check_ranges(_find_ranges(content))


def check_ranges(value: Any) -> Ranges:
    """Return a schedule if vLLM takes it and it drafts at some batch size.

    Raises:
        ViSpecError: it does not, with the form that is wanted.
    """
    if not isinstance(value, list | tuple) or not value or not all(map(_is_range, value)):
        raise ViSpecError(f"--schedule {json.dumps(value)} is not a list of ranges: {FORM}")
    ranges: Ranges = tuple((int(first), int(last), int(k)) for first, last, k in value)
    overlap = any(later[0] <= earlier[1] for earlier, later in pairwise(ranges))
    if ranges[0][0] != 1 or overlap:
        raise ViSpecError(f"--schedule {json.dumps(value)} does not begin at 1 or overlaps: {FORM}")
    if not highest(ranges):
        raise ViSpecError(
            f"--schedule {json.dumps(value)} drafts at no batch size: leave the side out, plain "
            "vLLM is what it says"
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
    return config


def _find_ranges(content: Any) -> Any:
    """Return what stands for ranges in the forms that are read."""
    if not isinstance(content, Mapping):
        return content
    for name in ("schedule", SETTING):
        if content.get(name) is not None:
            return content[name]
    k = content.get(K_SETTING)
    return None if k is None else [[1, 1, k]]


def _is_range(entry: Any) -> bool:
    if not isinstance(entry, list | tuple) or len(entry) != 3:
        return False
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in entry):
        return False
    first, last, k = entry
    return 1 <= first <= last and k >= 0

"""What a run measures of its target before the first step, on a few of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm_vispec.train.teacher import Teacher

SAMPLES = 16


class Probe(NamedTuple):
    """What a few samples show.

    Attributes:
        rows: counted rows of a sample, on average.
        state_size, embed_size: root mean square of the target's states and embeddings at answer
            tokens.
    """

    rows: float
    state_size: float
    embed_size: float


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """Return so many of the numbers, evenly spread over them."""
    count = min(count, len(numbers))
    return [numbers[(2 * place + 1) * len(numbers) // (2 * count)] for place in range(count)]


def probe(teacher: Teacher[Any], indices: Sequence[int]) -> Probe:
    """Look at samples of every length, the same ones on every process.

    Args:
        indices: samples of the run, of which `SAMPLES` are taken.
    """
    by_length = sorted(indices, key=lambda index: (teacher.lengths[index], index))
    chosen = spread(by_length, SAMPLES)
    rows, tokens, squares = 0, 0, [0.0, 0.0]
    # One at a time: this fits wherever training does.
    for ready in teacher.ready([index] for index in chosen):
        (observed,) = teacher.observe(ready)
        # Row p predicts token p + 2.
        rows += int(observed.answer[2:].sum())
        tokens += int(observed.answer.sum())
        for number, values_LD in enumerate((observed.hidden_LD, observed.embeds_LD)):
            squares[number] += float(values_LD[observed.answer].float().square().mean(-1).sum())
    return Probe(max(rows, 1) / len(chosen), *((one / max(tokens, 1)) ** 0.5 for one in squares))

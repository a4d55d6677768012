"""Which samples are asked: wanted families, families in turns, an order that a seed decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256

from vllm_vispec.bench.datasets.types import DatasetOptions
from vllm_vispec.bench.schema import BenchSample
from vllm_vispec.data.types import Rejected
from vllm_vispec.utils.errors import ViSpecError

Problem = Callable[[BenchSample], str | None]


def choose(
    samples: Sequence[BenchSample], options: DatasetOptions, problem: Problem
) -> tuple[list[BenchSample], list[Rejected]]:
    """Return the samples to ask, families in turns, and those that turned out unusable.

    Args:
        problem: what is wrong with a sample, None if nothing is. It is asked only about samples
            that are about to be chosen, since it opens their images.

    Raises:
        ViSpecError: a wanted family does not occur.
    """
    chosen: list[BenchSample] = []
    rejected: list[Rejected] = []
    for sample in _in_turns(_wanted(samples, options.families), options.seed):
        if len(chosen) == options.limit:
            break
        reason = problem(sample)
        if reason is None:
            chosen.append(sample)
        else:
            rejected.append(Rejected(sample.sample_id, reason))
    return chosen, rejected


def _wanted(samples: Sequence[BenchSample], families: Sequence[str]) -> list[BenchSample]:
    there = dict.fromkeys(sample.family for sample in samples)
    missing = [name for name in families if name not in there]
    if missing:
        raise ViSpecError(
            f"family {', '.join(missing)} has no usable sample in the dataset; there are "
            f"{', '.join(there)}"
        )
    return [sample for sample in samples if not families or sample.family in families]


def _in_turns(samples: Sequence[BenchSample], seed: int) -> Iterator[BenchSample]:
    """Yield one sample of each family, then the next of each, until all are through."""
    groups: dict[str, list[BenchSample]] = {}
    for sample in sorted(samples, key=lambda sample: _place(sample.sample_id, seed)):
        groups.setdefault(sample.family, []).append(sample)
    queues = [iter(groups[name]) for name in sorted(groups)]
    while queues:
        firsts = [next(queue, None) for queue in queues]
        yield from (sample for sample in firsts if sample is not None)
        queues = [queue for queue, first in zip(queues, firsts, strict=True) if first is not None]


def _place(sample_id: str, seed: int) -> bytes:
    """A sample's place in the order, whatever else is in the dataset."""
    return sha256(f"{seed}:{sample_id}".encode()).digest()

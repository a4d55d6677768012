"""Both sides answer the same questions in turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from vllm_vispec.bench.profile.parts import DECODE, KINDS, PREFILL
from vllm_vispec.bench.profile.rounds import Found, Round
from vllm_vispec.bench.profile.settings import EAGLE, SIDES, VISPEC
from vllm_vispec.bench.schema import BenchSample
from vllm_vispec.utils.errors import ViSpecError

UNPAIRED = "without a counterpart"

Say = Callable[[str], None]
Group = Sequence[BenchSample]


class Engine(Protocol):
    """What `EngineProcess` offers."""

    def ask(self, samples: Group) -> Found:
        """Have samples answered together."""


@dataclass(frozen=True)
class Block:
    """The rounds of one group of questions in one repetition, as many on both sides.

    Attributes:
        eagle, vispec: the first of one are the counterparts of the first of the other.
    """

    eagle: tuple[Round, ...]
    vispec: tuple[Round, ...]

    def rounds(self, side: str) -> tuple[Round, ...]:
        """Return a side's."""
        return {EAGLE: self.eagle, VISPEC: self.vispec}[side]

    def select(self, keep: Callable[[Round], bool]) -> Block:
        """Return the block of some of its rounds."""
        return Block(tuple(filter(keep, self.eagle)), tuple(filter(keep, self.vispec)))


@dataclass(frozen=True)
class Measured:
    """All blocks, and how many rounds are in none of them, by side and reason."""

    blocks: tuple[Block, ...]
    left_out: Mapping[str, Mapping[str, int]]


def groups_of(samples: Sequence[BenchSample], size: int) -> list[Group]:
    """Return the samples in groups that are asked together; the last is filled from the front.

    Raises:
        ViSpecError: there are fewer samples than a group needs.
    """
    if size > len(samples):
        raise ViSpecError(
            f"--concurrency {size}: the dataset has {len(samples)} samples; give more, or ask for "
            "less"
        )
    twice = [*samples, *samples]
    return [twice[start : start + size] for start in range(0, len(samples), size)]


def measure(
    engines: Mapping[str, Engine], groups: Sequence[Group], repetitions: int, say: Say = print
) -> Measured:
    """Let both sides answer every group in turns; the first time is to warm up.

    Who goes first alternates from group to group and from repetition to repetition.

    Raises:
        ViSpecError: an engine fails, or no round of a kind is complete.
    """
    for group in groups:
        for side in SIDES:
            engines[side].ask(group)
    left_out: dict[str, Counter[str]] = {side: Counter() for side in SIDES}
    blocks = []
    for repetition in range(repetitions):
        for number, group in enumerate(groups):
            order = SIDES if (repetition + number) % 2 == 0 else SIDES[::-1]
            found = {side: engines[side].ask(group) for side in order}
            blocks.append(pair(found[EAGLE], found[VISPEC]))
            for side in SIDES:
                left_out[side].update(_left_out(found[side], blocks[-1].rounds(side)))
        say(f"  repetition {repetition + 1} of {repetitions} done")
    measured = Measured(tuple(blocks), {side: dict(left_out[side]) for side in SIDES})
    _check(measured)
    return measured


def pair(eagle: Found, vispec: Found) -> Block:
    """Keep, of every kind of round, as many as both sides have.

    Prefills are counterparts if they are over the same batch. One side may need fewer decoding
    rounds; its last ones are over a longer context, so the rest of the other side's are left out.
    """
    pairs = [pair for kind in KINDS for pair in _pairs(kind, eagle.rounds, vispec.rounds)]
    return Block(tuple(one for one, _ in pairs), tuple(other for _, other in pairs))


def _pairs(
    kind: str, eagle: Sequence[Round], vispec: Sequence[Round]
) -> Iterator[tuple[Round, Round]]:
    sides = [[one for one in side if one.kind == kind] for side in (eagle, vispec)]
    return takewhile(lambda both: both[0].shape == both[1].shape, zip(*sides, strict=False))


def _left_out(found: Found, kept: Sequence[Round]) -> Counter[str]:
    alone = len(found.rounds) - len(kept)
    return Counter(found.left_out) + Counter({UNPAIRED: alone})


def _check(measured: Measured) -> None:
    there = {one.kind for block in measured.blocks for one in block.eagle}
    remedies = {
        DECODE: "raise --max-tokens, lower --concurrency, and leave graphs off (--enforce-eager)",
        PREFILL: "let a prompt fit into one step with --serve '--max-num-batched-tokens ...'",
    }
    for kind, remedy in remedies.items():
        if kind not in there:
            raise ViSpecError(
                f"no {kind} round could be compared (left out: {dict(measured.left_out)}): {remedy}"
            )

"""What a profile found: the content of `profile.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_vispec.bench.machine import has_gpu
from vllm_vispec.bench.profile.measure import Block, Measured
from vllm_vispec.bench.profile.parts import KINDS, PREFILL
from vllm_vispec.bench.profile.probes import find_runner
from vllm_vispec.bench.profile.rounds import Round
from vllm_vispec.bench.profile.settings import ProfileSettings
from vllm_vispec.bench.profile.statistics import Summary, summarise
from vllm_vispec.bench.schema import Record

FORMAT = 1
_CLOCKS = {
    "wall": "Wall time.",
    "cpu": "CPU time of the engine's thread, on one thread: waiting is not counted.",
}


@dataclass(frozen=True)
class ImageTokens(Record):
    """Prefill rounds over so many image tokens.

    Attributes:
        image_tokens: of the batch, all its requests together.
        requests: in the batch.
        summary: of these rounds.
    """

    image_tokens: int
    requests: int
    summary: Summary


@dataclass(frozen=True)
class Profile(Record):
    """Where a round's time goes, on both sides.

    Attributes:
        format: `FORMAT` of the version that wrote it.
        machine: see `describe_machine`.
        settings: see `ProfileSettings`.
        command: what a user types to measure this again.
        notes: what has to be known to read the numbers.
        left_out: rounds that are not among these, by side and reason.
        rounds: by kind, decode and prefill.
        prefill_by_image_tokens: prefill rounds apart, fewest image tokens first.
    """

    format: int
    machine: dict[str, Any]
    settings: dict[str, Any]
    command: str
    notes: tuple[str, ...]
    left_out: dict[str, dict[str, int]]
    rounds: dict[str, Summary]
    prefill_by_image_tokens: tuple[ImageTokens, ...]


def make_profile(
    settings: ProfileSettings, measured: Measured, machine: Mapping[str, Any], command: str
) -> Profile:
    """Return what blocks of both kinds of rounds say."""
    blocks = {kind: [_of_kind(block, kind) for block in measured.blocks] for kind in KINDS}
    return Profile(
        format=FORMAT,
        machine=dict(machine),
        settings=settings.to_json(),
        command=command,
        notes=tuple(notes(settings)),
        left_out={side: dict(reasons) for side, reasons in measured.left_out.items()},
        rounds={kind: summarise(found) for kind, found in blocks.items()},
        prefill_by_image_tokens=by_image_tokens(blocks[PREFILL]),
    )


def by_image_tokens(blocks: Sequence[Block]) -> tuple[ImageTokens, ...]:
    """Split prefill rounds by their number of image tokens and of requests."""

    def of(one: Round) -> tuple[int, int]:
        return one.image_tokens, one.requests

    def only(key: tuple[int, int]) -> list[Block]:
        return [block.select(lambda one: of(one) == key) for block in blocks]

    keys = sorted({of(one) for block in blocks for one in block.eagle})
    return tuple(ImageTokens(*key, summarise(only(key))) for key in keys)


def notes(settings: ProfileSettings) -> list[str]:
    """Return what has to be known to read the numbers of this machine and these settings."""
    found = [
        _CLOCKS[settings.clock],
        "Both engines have the same target and answer the same questions in turns; EAGLE's head "
        + ("was given." if settings.eagle_head else "has the sizes of ViSpec's."),
        f"A decoding round is over {settings.num_speculative_tokens + 1} tokens of "
        f"{settings.concurrency} request(s) on both sides, whether drafts are accepted or not.",
        "A part's time excludes that of the parts inside it. Each row is a median of its own, so "
        "rows do not quite add up; the bars are means over the middle 80 % of the rounds, and do.",
        "Without graphs and without asynchronous scheduling, unless --serve says otherwise; "
        "reading the clock adds a little to every part.",
    ]
    if has_gpu():
        found.append(
            "The GPU is idle at every reading of the clock. This serialises host and device: parts "
            "are what they cost one after another, and a round is longer than in a server."
        )
    elif find_runner(settings.runner).note_on_cpu:
        found.insert(0, find_runner(settings.runner).note_on_cpu)
    return found


def _of_kind(block: Block, kind: str) -> Block:
    return block.select(lambda one: one.kind == kind)

"""The parts of a round: what they are called, where they are measured, how they are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

DECODE, PREFILL = "decode", "prefill"
KINDS: Mapping[str, str] = MappingProxyType(
    {DECODE: "A decoding round", PREFILL: "A prefill round"}
)

ROUND, EXECUTE = "round", "execute"
TARGET_MODEL, TARGET_LOGITS, SAMPLE = "target_model", "target_logits", "sample"
PROPOSE, DRAFT_MODEL, DRAFT_LOGITS = "propose", "draft_model", "draft_logits"
DRAFT_SAMPLE, VISION, ADAPTOR, ROWS = "draft_sample", "vision", "adaptor", "rows"

FIRST_PASS, STEP, HOST = "draft_first_pass", "draft_step", "host"


@dataclass(frozen=True)
class Part:
    """A part of a round.

    Attributes:
        name: in the JSON file.
        label: in tables and legends.
        color: in the picture.
        span: whose own time it is; "" where a rule of its own says.
        kinds: rounds that have it.
    """

    name: str
    label: str
    color: str
    span: str = ""
    kinds: tuple[str, ...] = (DECODE, PREFILL)


PARTS: tuple[Part, ...] = (
    Part("vision_tower", "vision tower", "#f0e442", VISION, (PREFILL,)),
    Part("target_pass", "target pass", "#0072b2", TARGET_MODEL),
    Part("target_lm_head", "target lm_head", "#56b4e9", TARGET_LOGITS),
    Part("verification", "verification and sampling", "#8c6d00", SAMPLE),
    Part("adaptor", "vision adaptor", "#009e73", ADAPTOR, (PREFILL,)),
    Part("row_codes", "row codes", "#117733", ROWS),
    Part(FIRST_PASS, "draft first pass", "#d55e00"),
    Part(STEP, "draft step", "#e69f00"),
    Part("draft_lm_head", "draft lm_head", "#cc79a7", DRAFT_LOGITS),
    Part("draft_sampling", "draft sampling", "#882255", DRAFT_SAMPLE),
    Part("draft_host", "host work of the draft", "#8c8c8c", PROPOSE),
    Part(HOST, "host work, the rest", "#d0d0d0"),
)

WHOLES: Mapping[str, str] = MappingProxyType(
    {
        "first_pass": "first pass, call of the proposer to its logits",
        "step": "step, logits to logits",
        "propose": "all of drafting",
        "round": "all of the round",
    }
)
"""What overlaps the parts: times by other borders, the same on every runner."""


def columns(kind: str, num_draft_tokens: int) -> dict[str, Part]:
    """Return the parts of a kind of round by name, in order, every draft step apart.

    Their seconds add up to the round's.
    """
    found: dict[str, Part] = {}
    for part in PARTS:
        if kind in part.kinds and part.name != STEP:
            found[part.name] = part
        elif kind in part.kinds:
            found |= {f"{STEP}_{number}": part for number in range(1, num_draft_tokens)}
    return found


def label_of(name: str, part: Part) -> str:
    """Return what a column is called; steps have numbers."""
    return part.label + name.removeprefix(part.name).replace("_", " ")

"""A word about heads that are hardly ever right: speculation then costs more than it gains.

vLLM logs the acceptance length of a server every ten seconds. A filter of that logger reads the
first such lines; nothing of vLLM is patched.
"""

import logging
import re

from vllm_vispec.heads.families import was_tested
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

LOW = 1.2
"""Acceptance length below which a draft rarely pays for itself: fewer than one accepted draft token
in five steps, where drafting and verifying a few tokens takes a fifth of a step or more."""
_ENOUGH, _ENOUGH_OF_UNKNOWN = 200, 64
"""Draft tokens that log lines must be about; fewer if nobody tested the target's family."""
_CHANCE = 1.02
"""Acceptance length of drafts that are right by chance, or not even numbers."""
_LOGGER = "vllm.v1.metrics.loggers"
_LINE = re.compile(
    r"SpecDecoding metrics: Mean acceptance length: ([\d.]+),.* Drafted: (\d+) tokens"
)


def low_acceptance(length: float, least: float = LOW) -> str | None:
    """Return what to say about an acceptance length, None if it is not low.

    Args:
        least: from where on the draft pays for itself.
    """
    if length >= least:
        return None
    return (
        f"acceptance length {length:.2f} is so low that speculation probably costs more than it "
        "gains: train the head longer, on this target's own answers, or serve without it; "
        "docs/low-acceptance.md lists what else to check"
    )


def unknown_family(length: float, family: str) -> str | None:
    """Return what to say about the first drafts for a family that nobody tested, else None."""
    if length > _CHANCE:
        return None
    return (
        f"the first drafts for {family}, a family that was not tested, are hardly ever accepted "
        f"(acceptance length {length:.2f}): the head reads something else than it was trained on; "
        "outputs are right, serve without it"
    )


class _FirstAcceptance(logging.Filter):
    """Drops nothing; warns once if vLLM's first lines, of enough draft tokens, show too little."""

    told = True
    family: str | None = None
    # Draft tokens so far, and the acceptance lengths of their lines, weighted by them.
    drafted = 0
    weighted = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        found = None if self.told else _LINE.match(record.getMessage())
        if found is None:
            return True
        self.drafted += int(found[2])
        self.weighted += int(found[2]) * float(found[1])
        if self.drafted >= (_ENOUGH if self.family is None else _ENOUGH_OF_UNKNOWN):
            self.told, length = True, self.weighted / self.drafted
            note = unknown_family(length, self.family) if self.family else None
            note = note or low_acceptance(length)
            if note is not None:
                logger.warning("ViSpec: %s", note)
        return True


_WATCH = _FirstAcceptance()


def watch_acceptance(model_type: str) -> None:
    """Have the first acceptance length that vLLM logs from now on judged.

    Args:
        model_type: The target's.
    """
    _WATCH.told, _WATCH.drafted, _WATCH.weighted = False, 0, 0.0
    _WATCH.family = None if was_tested(model_type) else model_type
    logging.getLogger(_LOGGER).addFilter(_WATCH)

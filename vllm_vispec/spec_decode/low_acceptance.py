"""A word about heads that are hardly ever right: speculation then costs more than it gains.

vLLM logs the acceptance length of a server every ten seconds. A filter of that logger reads the
first such line; nothing of vLLM is patched.
"""

import logging
import re

from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

LOW = 1.2
"""Acceptance length below which a draft rarely pays for itself: fewer than one accepted draft token
in five steps, where drafting and verifying a few tokens takes a fifth of a step or more."""
_ENOUGH = 200
"""Draft tokens that a log line must be about."""
_LOGGER = "vllm.v1.metrics.loggers"
_LINE = re.compile(
    r"SpecDecoding metrics: Mean acceptance length: ([\d.]+),.* Drafted: (\d+) tokens"
)


def low_acceptance(length: float) -> str | None:
    """Return what to say about an acceptance length, None if it is not low."""
    if length >= LOW:
        return None
    return (
        f"acceptance length {length:.2f} is so low that speculation probably costs more than it "
        "gains: train the head longer, on this target's own answers, or serve without it; "
        "docs/low-acceptance.md lists what else to check"
    )


class _FirstAcceptance(logging.Filter):
    """Drops nothing; warns once if vLLM's first line about enough draft tokens shows too little."""

    told = True

    def filter(self, record: logging.LogRecord) -> bool:
        found = None if self.told else _LINE.match(record.getMessage())
        if found is not None and int(found[2]) >= _ENOUGH:
            self.told = True
            note = low_acceptance(float(found[1]))
            if note is not None:
                logger.warning("ViSpec: %s", note)
        return True


_WATCH = _FirstAcceptance()


def watch_acceptance() -> None:
    """Have the first acceptance length that vLLM logs from now on judged."""
    _WATCH.told = False
    logging.getLogger(_LOGGER).addFilter(_WATCH)

"""Processes that a run starts and that must not outlive it."""

from __future__ import annotations

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1
# Looked up here: between fork and exec as little as possible may happen.
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """In a child before it starts: ask for SIGTERM when its parent dies, of SIGKILL too.

    Only Linux can. Elsewhere a run that is killed with SIGKILL leaves its servers behind.
    """
    if _PRCTL is not None:
        _PRCTL(PR_SET_PDEATHSIG, int(signal.SIGTERM))

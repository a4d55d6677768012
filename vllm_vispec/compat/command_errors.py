"""Lets vLLM's commands end with one line where a setting is refused, instead of a traceback."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from vllm_vispec.compat.patching import patch
from vllm_vispec.utils.errors import ViSpecError


def install() -> None:
    """Replace ``sys.excepthook``, once, in a process that runs one of vLLM's commands.

    Only refusals that end the process change their looks; its exit status stays 1. Programs that
    use ``vllm.LLM`` keep their tracebacks.
    """
    if is_vllm_command(sys.argv):
        patch(sys, "excepthook", _show)


def is_vllm_command(arguments: list[str]) -> bool:
    """Whether a process with this ``sys.argv`` is ``vllm ...`` or ``python -m vllm....``."""
    import vllm

    program = Path(arguments[0]) if arguments else Path()
    return program.name == "vllm" or Path(vllm.__file__).parent in program.absolute().parents


def _show(
    original: Callable[..., None],
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    if isinstance(error, ViSpecError):
        print(f"vllm-vispec: {error}", file=sys.stderr, flush=True)
    else:
        original(kind, error, trace)

"""Starting an engine or a server of vLLM, and one line that says why it did not start.

vLLM ends with tracebacks of several processes, the cause among them: an exception in a worker, then
"Engine core initialization failed" in the process that waited.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vllm_vispec.utils.errors import ViSpecError

Spell = Callable[[str, str], str]
"""(vLLM's name of a setting, value) -> how a user writes it for the command at hand."""

SETTLE_S = 0.2
"""For the last words of processes that are gone already."""

# "(EngineCore pid=12) ", "ERROR 11-30 06:37:16 [core.py:1186] " in front of a line.
_PREFIX = re.compile(r"^(?:\([^()]*pid=\d+\)\s*)?(?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]+\]\s?)?")
_EXCEPTION = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Interrupt|Exit))(?:: ?(.*))?$")
# Their messages are sentences; those of other exceptions ("KeyError: 3") need the class.
_WORDED = re.compile(
    r"^(ViSpec|Value|OS|Runtime|Validation|OutOfMemory|NotImplemented|\w*NotFound)Error$|^Exception$"
)
_OURS = re.compile(r"^vllm-vispec: (.+)$")
# Exceptions of processes that only waited for another one, or were ended since one had failed.
_WAITING = re.compile(
    r"(?i)core initialization failed|WorkerProc initialization failed|root cause|"
    r"background process|cancelled|broken pipe|connection (?:reset|closed) by peer|"
    r"^(?:SystemExit|KeyboardInterrupt)\b"
)
_FREE = re.compile(r"\(([\d.]+)/([\d.]+) GiB\) on startup")
_SEE = re.compile(r"\s*See https?://\S+.*$")


def spelled_as_json(flag: str) -> Spell:
    """Settings are members of a JSON object that ``flag`` takes."""
    return lambda name, value: f"{flag} '{{\"{name}\": {value}}}'"


def spelled_as_option(name: str, value: str) -> str:
    """Settings are options of ``vllm serve``."""
    return f"--{name.replace('_', '-')} {value}"


def why(text: str, spell: Spell) -> str:
    """Return in one line why an engine did not start, with the remedy.

    Args:
        text: its log, or the text of the exception it raised.
        spell: how the user writes a setting.
    """
    cause = find_cause(text)
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, cause):
            return f"{_first_sentence(cause)}: {remedy(cause, spell)}"
    return cause


def find_cause(text: str) -> str:
    """Return the message of the exception that was raised first and in no other's name.

    Of a chain of exceptions it is the last, which was worded for users.
    """
    lines = [_PREFIX.sub("", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    found = [match for line in lines if (match := _OURS.match(line) or _EXCEPTION.match(line))]
    telling = [match for match in found if not _WAITING.search(match.group(0))]
    if telling:
        return _without_pydantic(_message(*telling[-1].groups()), lines)
    return lines[-1] if lines else "it said nothing"


def _message(first: str, text: str | None = "") -> str:
    """The message of a class and its text, or of a line of ours, which has no class."""
    if not _EXCEPTION.match(first):
        return first
    return f"{first}: {text}" if text and not _WORDED.match(first) else text or first


def _without_pydantic(message: str, lines: list[str]) -> str:
    """Where pydantic only counts errors, what the first one says."""
    if "validation error" not in message:
        return message
    for line in lines:
        stated = re.match(r"(?:Value error, )?(.+?) \[type=", line)
        if stated:
            return stated.group(1)
    return message


def _first_sentence(message: str) -> str:
    return re.split(r"\.\s", _SEE.sub("", message), maxsplit=1)[0].rstrip(". ")


def _less_memory(cause: str, spell: Spell) -> str:
    """A share of all memory that what is free now allows."""
    found = _FREE.search(cause)
    free, total = map(float, found.groups()) if found else (0.0, 0.0)
    share = f"{int(95 * free / total) / 100:.2f}" if free and total else "0.5"
    lower = spell("gpu_memory_utilization", share)
    return f"lower gpu_memory_utilization (e.g. {lower}), or end what else uses the memory"


def _smaller_batches(cause: str, spell: Spell) -> str:
    return (
        f"lower max_num_seqs (e.g. {spell('max_num_seqs', '16')}) or max_model_len, or leave more "
        f"room beside the KV cache ({spell('gpu_memory_utilization', '0.8')})"
    )


def _more_cache(cause: str, spell: Spell) -> str:
    fits = re.search(r"maximum model length is (\d+)", cause)
    length = fits.group(1) if fits else "2048"
    return (
        f"lower max_model_len (e.g. {spell('max_model_len', length)}), or raise "
        "gpu_memory_utilization"
    )


def _other_model(cause: str, spell: Spell) -> str:
    return "check the name of the target, the network and the token, or give its folder"


_REMEDIES: tuple[tuple[str, Callable[[str, Spell], str]], ...] = (
    (r"desired (?:GPU|CPU) memory utilization|the engine's budget", _less_memory),
    (r"No available memory for the cache blocks|at least one request|auto-fit max", _more_cache),
    (r"(?i)out of memory|can't allocate memory", _smaller_batches),
    (
        r"not a valid model identifier|Repository Not Found|couldn't connect to|cached snapshot",
        _other_model,
    ),
)


@contextlib.contextmanager
def starting_engine(target: str, spell: Spell) -> Iterator[None]:
    """Build a ``vllm.LLM`` inside; what its processes print is shown once it runs, or never.

    Raises:
        ViSpecError: it does not start; one line with the cause, and where the whole log lies.
    """
    with held_output() as held:
        try:
            yield
        except ViSpecError:
            held.drop()
            raise
        except (Exception, SystemExit) as error:
            text = held.drop()
            raised = f"{type(error).__name__}: {error}"
            # The exception here may only have waited for a process that knows the cause.
            cause = why(text if _WAITING.search(raised) else raised, spell)
            raise ViSpecError(
                f"the engine does not start with target {target}: {cause} "
                f"(whole log: {_keep(text + raised)})"
            ) from error


def _keep(text: str) -> Path:
    descriptor, name = tempfile.mkstemp(prefix="vispec-engine-", suffix=".log")
    with os.fdopen(descriptor, "w") as file:
        file.write(text + "\n")
    return Path(name)


class HeldOutput:
    """What this process and its children wrote to their standard streams."""

    def __init__(self, source: int, sink: int) -> None:
        self._source, self._sink = source, sink
        self._lock = threading.Lock()
        self._held: list[bytes] | None = []
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._thread.start()

    def drop(self) -> str:
        """Return what was written and never show it."""
        _flush()
        time.sleep(SETTLE_S)
        with self._lock:
            text, self._held = b"".join(self._held or ()), []
        return text.decode(errors="replace")

    def release(self) -> None:
        """Show what was written, and from now on everything at once."""
        with self._lock:
            for piece in self._held or ():
                os.write(self._sink, piece)
            self._held = None

    def _pump(self) -> None:
        while piece := os.read(self._source, 65536):
            with self._lock:
                if self._held is None:
                    os.write(self._sink, piece)
                else:
                    self._held.append(piece)


@contextlib.contextmanager
def held_output() -> Iterator[HeldOutput]:
    """Hold back what is written to stdout and stderr inside, then show it on stderr.

    Processes started inside keep writing there, so that what they say later is shown at once.
    """
    _flush()
    source, target = os.pipe()
    saved = {stream: os.dup(stream) for stream in (1, 2)}
    held = HeldOutput(source, saved[2])
    for stream in saved:
        os.dup2(target, stream)
    os.close(target)
    try:
        yield held
    finally:
        _flush()
        for stream in saved:
            os.dup2(saved[stream], stream)
        os.close(saved[1])
        held.release()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError):
            stream.flush()

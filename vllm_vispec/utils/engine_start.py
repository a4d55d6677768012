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
from collections.abc import Callable, Iterator, Mapping
from typing import Self

from vllm_vispec.utils.errors import ViSpecError

Spell = Callable[[str, str], str]
"""(vLLM's name of a setting, value) -> how a user writes it for the command at hand."""

SETTLE_S = 0.2
"""For the last words of processes that are gone already."""

# "(EngineCore pid=12) ", "ERROR 11-30 06:37:16 [core.py:1186] " in front of a line.
_PREFIX = re.compile(r"^(?:\([^()]*pid=\d+\)\s*)?(?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]+\]\s?)?")
_EXCEPTION = re.compile(
    r"^(?:\w+\.)*(?P<name>\w*(?:Error|Exception|Interrupt|Exit))(?:: ?(?P<said>.*))?$"
)
# Their messages are sentences; those of other exceptions ("KeyError: 3") need the class.
_WORDED = re.compile(
    r"^(ViSpec|Value|OS|Runtime|Validation|OutOfMemory|NotImplemented|\w*NotFound)Error$|^Exception$"
)
_OURS = re.compile(r"^vllm-vispec: (?P<said>.+)$")
# Exceptions of processes that only waited for another one, or were ended since one had failed.
_WAITING = re.compile(
    r"(?i)core initialization failed|WorkerProc initialization failed|root cause|"
    r"background process|cancelled|broken pipe|connection (?:reset|closed) by peer|"
    r"^(?:SystemExit|KeyboardInterrupt)\b"
)
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
    for pattern, remedy in _REMEDIES.items():
        if re.search(pattern, cause):
            sentence = re.split(r"\.\s", _SEE.sub("", cause), maxsplit=1)[0].rstrip(". ")
            return f"{sentence}: {remedy(cause, spell)}"
    return cause


def find_cause(text: str) -> str:
    """Return the message of the exception that was raised first and in no other's name.

    Of a chain of exceptions it is the last, which was worded for users.
    """
    lines = [_PREFIX.sub("", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    found = [match for line in lines if (match := _OURS.match(line) or _EXCEPTION.match(line))]
    telling = [match for match in found if not _WAITING.search(match[0])]
    if not telling:
        return lines[-1] if lines else "it said nothing"
    named, said = telling[-1].groupdict().get("name"), telling[-1]["said"]
    message = str(said or named)
    if named and said and not _WORDED.match(named):
        message = f"{named}: {said}"
    if "validation error" in message:
        # Pydantic only counts errors here; a later line says what the first one is.
        stated = (re.match(r"(?:Value error, )?(.+?) \[type=", line) for line in lines)
        return next((match[1] for match in stated if match), message)
    return message


def _less_memory(cause: str, spell: Spell) -> str:
    """A share of all memory that what is free now allows."""
    found = re.search(r"\(([\d.]+)/([\d.]+) GiB\) on startup", cause)
    share = int(95 * float(found[1]) / float(found[2])) / 100 if found else 0.5
    lower = spell("gpu_memory_utilization", f"{share:.2f}")
    return f"lower gpu_memory_utilization (e.g. {lower}), or end what else uses the memory"


def _smaller_batches(cause: str, spell: Spell) -> str:
    return (
        f"lower max_num_seqs (e.g. {spell('max_num_seqs', '16')}) or max_model_len, or leave more "
        f"room beside the KV cache ({spell('gpu_memory_utilization', '0.8')})"
    )


def _more_cache(cause: str, spell: Spell) -> str:
    fits = re.search(r"maximum model length is (\d+)", cause)
    lower = spell("max_model_len", fits[1] if fits else "2048")
    return f"lower max_model_len (e.g. {lower}), or raise gpu_memory_utilization"


def _other_model(cause: str, spell: Spell) -> str:
    return "check the name of the target, the network and the token, or give its folder"


_REMEDIES: Mapping[str, Callable[[str, Spell], str]] = {
    r"desired (?:GPU|CPU) memory utilization|the engine's budget": _less_memory,
    r"No available memory for the cache blocks|at least one request|auto-fit max": _more_cache,
    r"(?i)out of memory|can't allocate memory": _smaller_batches,
    r"not a valid model identifier|Repository Not Found|couldn't connect to|cached snapshot": (
        _other_model
    ),
}


@contextlib.contextmanager
def starting_engine(target: str, spell: Spell) -> Iterator[None]:
    """Build a ``vllm.LLM`` inside; what its processes print is shown once it runs, or never.

    Raises:
        ViSpecError: it does not start; one line with the cause, and where the whole log lies.
    """
    with HeldOutput() as held:
        try:
            yield
        except ViSpecError:
            held.drop()
            raise
        except (Exception, SystemExit) as error:
            text, raised = held.drop(), f"{type(error).__name__}: {error}"
            # The exception here may only have waited for a process that knows the cause.
            cause = why(text if _WAITING.search(raised) else raised, spell)
            descriptor, log = tempfile.mkstemp(prefix="vispec-engine-", suffix=".log")
            with os.fdopen(descriptor, "w") as file:
                file.write(f"{text}{raised}\n")
            raise ViSpecError(
                f"the engine does not start with target {target}: {cause} (whole log: {log})"
            ) from error


class HeldOutput:
    """Holds back what is written to stdout and stderr inside, then shows it on stderr.

    Processes started inside keep writing there, so that what they say later is shown at once.
    """

    def __enter__(self) -> Self:
        _flush()
        self._source, sink = os.pipe()
        self._saved = {stream: os.dup(stream) for stream in (1, 2)}
        self._lock = threading.Lock()
        self._held: list[bytes] | None = []
        threading.Thread(target=self._pump, daemon=True).start()
        for stream in self._saved:
            os.dup2(sink, stream)
        os.close(sink)
        return self

    def __exit__(self, *_: object) -> None:
        _flush()
        for stream, saved in self._saved.items():
            os.dup2(saved, stream)
        os.close(self._saved[1])
        with self._lock:
            for piece in self._held or ():
                os.write(self._saved[2], piece)
            self._held = None

    def drop(self) -> str:
        """Return what was written and never show it."""
        _flush()
        time.sleep(SETTLE_S)
        with self._lock:
            text, self._held = b"".join(self._held or ()), []
        return text.decode(errors="replace")

    def _pump(self) -> None:
        while piece := os.read(self._source, 65536):
            with self._lock:
                if self._held is None:
                    os.write(self._saved[2], piece)
                else:
                    self._held.append(piece)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError):
            stream.flush()

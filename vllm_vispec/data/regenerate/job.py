"""A regeneration job: the target answers every sample of a file once, however often it is stopped.

The output is a journal, one line per finished sample, in shards if they are many. Beside
``out.jsonl`` lie ``out.jsonl.meta.json`` (the shards; settings and hash of the input: another
configuration must not mix its answers in), ``out.jsonl.rejected.jsonl`` and, at the end,
``out.jsonl.summary.json``.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal

from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.regenerate.dialogue import Backend, Regenerated, Result
from vllm_vispec.data.regenerate.journal import Journal, write_line
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.shards import files_of
from vllm_vispec.data.types import (
    ANSWER_TOKENS_KEY,
    FINISH_KEY,
    Conversation,
    Rejected,
    to_messages,
)
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import lock, write_json

BackendName = Literal["offline", "processes", "server", "ray"]
# Named as text, so that nothing heavy is imported before it is used.
BACKENDS: Mapping[BackendName, str] = {
    "offline": "vllm_vispec.data.regenerate.offline:OfflineBackend",
    "processes": "vllm_vispec.data.regenerate.processes:ProcessesBackend",
    "server": "vllm_vispec.data.regenerate.server:ServerBackend",
    "ray": "vllm_vispec.data.regenerate.ray_data:RayBackend",
}
REASON_CLASSES = (
    "does not exist",
    "cannot be read",
    "is not a path",
    "not JSON",
    "was there before",
    "no question",
    "maximum context length",
    "empty answer",
    "the answer ended with",
    "the server refuses",
    "template round trip",
    "chat template",
)
"""Reasons without what is particular to a sample, for the summary."""


DEGENERATE_RATIO = 5.0
"""Bytes per compressed byte of an answer's end; English prose has about 2."""
EXAMPLES = 3


@dataclass
class Summary:
    """Counts of a job: ``success + error + skipped == total``.

    ``skipped`` were in the output already. ``length`` counts answers that the token limit ended,
    ``round_trip_failed`` samples whose text has other tokens than the target generated (they are
    kept unless the job is strict), ``round_trip_unchecked`` those of a server that tells no tokens.
    ``degenerate`` counts answers that repeat themselves, with a few examples.
    """

    total: int = 0
    success: int = 0
    error: int = 0
    skipped: int = 0
    answers: int = 0
    answer_tokens: int = 0
    length: int = 0
    round_trip_failed: int = 0
    round_trip_unchecked: int = 0
    degenerate: int = 0
    degenerate_examples: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)


def make_backend(name: BackendName, settings: RegenerateSettings) -> Backend:
    """Build a backend.

    Raises:
        ViSpecError: it does not start.
    """
    backend: Backend = resolve_name(BACKENDS[name])(settings)
    return backend


def regenerate_all(
    settings: RegenerateSettings,
    backend: BackendName = "offline",
    make: Callable[[BackendName, RegenerateSettings], Backend] = make_backend,
    progress: bool = False,
) -> Summary:
    """Run a job to its end, or go on with one that was stopped.

    Samples that were rejected earlier are tried again. The engine is only started if there is
    something to do.

    Raises:
        ViSpecError: the input or output cannot be used, or the backend fails as a whole. Everything
            that was finished until then is in the output.
    """
    if settings.output.resolve() == settings.input.resolve():
        raise ViSpecError(f"--output {settings.output} is the input; choose another file")
    settings = settings.with_image_bounds()
    with _Job(settings) as job:
        todo = job.begin()
        if todo:
            job.run(make(backend, settings), todo, progress)
        job.finish()
    return job.summary


class _Job:
    """Counts results and appends them to the output.

    Raises:
        ViSpecError: the output belongs to another configuration or another running job, a line of
            it is damaged, or it cannot be written.
    """

    def __init__(self, settings: RegenerateSettings) -> None:
        self.settings, self.summary = settings, Summary()
        configuration = settings.fingerprint() | {"input_sha256": _content_hash(settings.input)}
        self._journal = Journal(settings.output, configuration, settings.shard_samples)
        with self._journal.naming_failures(), ExitStack() as stack:
            settings.output.parent.mkdir(parents=True, exist_ok=True)
            rejected = settings.beside("rejected.jsonl")
            self._rejected = stack.enter_context(rejected.open("ab", buffering=0))
            lock(
                self._rejected,
                f"--output {settings.output} is being written by another job; choose another file",
            )
            stack.enter_context(closing(self._journal))
            self._journal.load()
            self._rejected.truncate(0)
            self._open = stack.pop_all()

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, *details: object) -> None:
        self._open.close()  # gives the lock back

    def begin(self) -> list[Conversation]:
        """Count the input, open the output if need be, and return what is still to do."""
        todo = []
        for item in read_conversations(self.settings.input, self.settings.image_root):
            self.summary.total += 1
            if isinstance(item, Rejected):
                self._reject(item)
            elif item.sample_id in self._journal.ids:
                self.summary.skipped += 1
            else:
                todo.append(item)
        if todo or not self._journal.ids:
            with self._journal.naming_failures():
                self._journal.open(self.summary.total)
        return todo

    def run(self, backend: Backend, todo: list[Conversation], progress: bool) -> None:
        """Have everything answered.

        Raises:
            ViSpecError: the backend lost samples.
        """
        from tqdm import tqdm

        summary = self.summary
        with closing(backend), tqdm(total=len(todo), unit="sample", disable=not progress) as bar:
            for result in backend.answer(todo):
                self._note(result)
                bar.update()
                bar.set_postfix(errors=summary.error, tokens=summary.answer_tokens, refresh=False)
        if summary.success + summary.error + summary.skipped != summary.total:
            raise ViSpecError(
                f"the backend returned {summary.success} of {len(todo)} samples and went away; run "
                "the same command again"
            )

    def finish(self) -> None:
        """Write what was counted."""
        self._journal.finish()
        write_json(self.settings.beside("summary.json"), vars(self.summary))

    def _note(self, result: Result) -> None:
        summary = self.summary
        if isinstance(result, Rejected):
            self._reject(result)
            return
        if result.round_trip is False:
            summary.round_trip_failed += 1
            if self.settings.strict:
                reason = f"template round trip: {result.round_trip_reason}"
                self._reject(Rejected(result.conversation.sample_id, reason))
                return
        with self._journal.naming_failures():
            self._journal.append(_to_record(result, self.settings))
        summary.success += 1
        summary.round_trip_unchecked += result.round_trip is None
        summary.answers += len(result.answers)
        summary.answer_tokens += sum(len(answer.token_ids or ()) for answer in result.answers)
        for answer in result.answers:
            if repeats_itself(answer.text):
                summary.degenerate += 1
                if len(summary.degenerate_examples) < EXAMPLES:
                    end = " ".join(answer.text[-60:].split())
                    summary.degenerate_examples.append(f"{result.conversation.sample_id}: ...{end}")
        summary.length += sum(answer.finish_reason == "length" for answer in result.answers)

    def _reject(self, item: Rejected) -> None:
        with self._journal.naming_failures():
            write_line(self._rejected, {"id": item.sample_id, "reason": item.reason})
        self.summary.error += 1
        known = (name for name in REASON_CLASSES if name in item.reason)
        self.summary.reasons[next(known, "other")] += 1


def repeats_itself(text: str) -> bool:
    """Whether an answer ends in repetition: its end compresses much better than prose does."""
    end = text[-1000:].encode()
    return len(end) > 200 and len(end) > DEGENERATE_RATIO * len(zlib.compress(end))


def _content_hash(path: Path) -> str:
    total = hashlib.sha256()
    try:
        for file in files_of(path) or [path]:
            with file.open("rb") as source:
                hashlib.file_digest(source, lambda: total)
    except OSError as error:
        raise ViSpecError(
            f"--input {path} cannot be read ({error.strerror or error}): give a folder of images "
            "or a file of questions"
        ) from error
    return total.hexdigest()


def _to_record(done: Regenerated, settings: RegenerateSettings) -> dict[str, Any]:
    """Return a dialogue as a record of the output file (OpenAI style).

    Its questions are those that the target was asked. With an image root, image paths stay as
    written: the reader of the output is given the same root. Without one, relative paths start from
    the folder of the file they are in.
    """

    def to_image(path: str) -> dict[str, str]:
        is_absolute = Path(path).is_absolute() or path.startswith("file://")
        if settings.image_root is None and not is_absolute:
            path = os.path.relpath(settings.input.parent / path, settings.output.parent)
        return {"type": "image", "image": path}

    return {
        "id": done.conversation.sample_id,
        "family": done.conversation.family,
        "messages": to_messages(done.conversation.turns, to_image),
        ANSWER_TOKENS_KEY: [answer.token_ids for answer in done.answers],
        FINISH_KEY: [answer.finish_reason for answer in done.answers],
        "round_trip": done.round_trip,
        "prompt_style": settings.style_name,
        "temperature": settings.temperature_of(done.conversation.sample_id),
        "top_p": settings.top_p,
        "seed": settings.seed,
        **settings.image_bounds,
        "model": settings.target,
    }

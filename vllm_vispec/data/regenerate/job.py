"""A regeneration job: input, backend and journal brought together, every sample counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.regenerate.backends import Backend, make_backend
from vllm_vispec.data.regenerate.dialogue import Regenerated
from vllm_vispec.data.regenerate.journal import Journal, file_hash
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.types import ANSWER_TOKENS_KEY, FINISH_KEY, Conversation, Part, Rejected
from vllm_vispec.utils.errors import ViSpecError

BackendMaker = Callable[[str, RegenerateSettings], Backend]

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


@dataclass
class Summary:
    """Counts of a job: ``success + error + skipped == total``.

    ``skipped`` were in the output already. ``length`` counts answers that the token limit ended,
    ``round_trip_failed`` samples whose text has other tokens than the target generated (they are
    kept unless the job is strict), ``round_trip_unchecked`` those of a server that tells no tokens.
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
    reasons: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """Return the counts as plain data."""
        return asdict(self) | {"reasons": dict(self.reasons)}


def regenerate_all(
    settings: RegenerateSettings,
    backend: str = "offline",
    make: BackendMaker = make_backend,
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
    configuration = settings.fingerprint() | {"input_sha256": file_hash(settings.input)}
    with Journal(settings.output, configuration) as journal:
        job = _Job(settings, journal)
        todo = job.read_input()
        if todo:
            job.run(make(backend, settings), todo, progress)
        journal.write_summary(job.summary.to_json())
    return job.summary


class _Job:
    """Writes results into the journal and counts them."""

    def __init__(self, settings: RegenerateSettings, journal: Journal) -> None:
        self.settings, self.journal, self.summary = settings, journal, Summary()

    def read_input(self) -> list[Conversation]:
        """Count the input and return what is still to do."""
        todo = []
        for item in read_conversations(self.settings.input, self.settings.image_root):
            self.summary.total += 1
            if isinstance(item, Rejected):
                self._reject(item)
            elif item.sample_id in self.journal.done:
                self.summary.skipped += 1
            else:
                todo.append(item)
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

    def _note(self, result: Regenerated | Rejected) -> None:
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
        self.journal.add(to_record(result, self.settings))
        summary.success += 1
        summary.round_trip_unchecked += result.round_trip is None
        summary.answers += len(result.answers)
        summary.answer_tokens += sum(len(answer.token_ids or ()) for answer in result.answers)
        summary.length += sum(answer.finish_reason == "length" for answer in result.answers)

    def _reject(self, item: Rejected) -> None:
        self.journal.reject(item.sample_id, item.reason)
        self.summary.error += 1
        known = (name for name in REASON_CLASSES if name in item.reason)
        self.summary.reasons[next(known, "other")] += 1


def to_record(done: Regenerated, settings: RegenerateSettings) -> dict[str, Any]:
    """Return a dialogue as a record of the output file (OpenAI style).

    Its questions are those that the target was asked.
    """
    conversation = done.conversation
    messages = [
        {"role": turn.role, "content": [_content(part, settings) for part in turn.parts]}
        for turn in conversation.turns
    ]
    return {
        "id": conversation.sample_id,
        "family": conversation.family,
        "messages": messages,
        ANSWER_TOKENS_KEY: [
            None if answer.token_ids is None else list(answer.token_ids) for answer in done.answers
        ],
        FINISH_KEY: [answer.finish_reason for answer in done.answers],
        "round_trip": done.round_trip,
        "prompt_style": settings.style_name,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": settings.seed,
        "model": settings.target,
    }


def _content(part: Part, settings: RegenerateSettings) -> dict[str, str]:
    """A part of a message. Image paths are the output's.

    With an image root they stay as written: the reader of the output is given the same root.
    Without one, relative paths start from the folder of the file they are in.
    """
    if part.image is None:
        return {"type": "text", "text": part.text}
    path = part.image
    is_absolute = Path(path).is_absolute() or path.startswith("file://")
    if settings.image_root is None and not is_absolute:
        path = os.path.relpath(settings.input.parent / path, settings.output.parent)
    return {"type": "image", "image": path}

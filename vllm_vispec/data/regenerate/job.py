"""A regeneration job: input, backend and journal brought together, every sample counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.regenerate.backends import Backend, make_backend
from vllm_vispec.data.regenerate.dialogue import Regenerated
from vllm_vispec.data.regenerate.journal import Journal, file_hash
from vllm_vispec.data.regenerate.record import to_record
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.types import Conversation, Rejected
from vllm_vispec.utils.errors import ViSpecError

BackendMaker = Callable[[str, RegenerateSettings], Backend]


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
    check_output(settings)
    configuration = settings.fingerprint() | {"input_sha256": file_hash(settings.input)}
    with Journal(settings.output, configuration) as journal:
        summary = Summary()
        todo = _take_stock(settings, journal, summary)
        if todo:
            _run(make(backend, settings), todo, settings, journal, summary, progress)
        journal.write_summary(summary.to_json())
    return summary


def check_output(settings: RegenerateSettings) -> None:
    """Refuse to write into the input.

    Raises:
        ViSpecError: input and output are the same file.
    """
    if settings.output.resolve() == settings.input.resolve():
        raise ViSpecError(f"--output {settings.output} is the input; choose another file")


def _take_stock(
    settings: RegenerateSettings, journal: Journal, summary: Summary
) -> list[Conversation]:
    """Read the input, count and return what is still to do."""
    todo = []
    for item in read_conversations(settings.input, settings.image_root):
        summary.total += 1
        if isinstance(item, Rejected):
            _reject(item, journal, summary)
        elif item.sample_id in journal.done:
            summary.skipped += 1
        else:
            todo.append(item)
    return todo


def _run(
    backend: Backend,
    todo: list[Conversation],
    settings: RegenerateSettings,
    journal: Journal,
    summary: Summary,
    progress: bool,
) -> None:
    from tqdm import tqdm

    with closing(backend), tqdm(total=len(todo), unit="sample", disable=not progress) as bar:
        for result in backend.answer(todo):
            _note(result, settings, journal, summary)
            bar.update()
            bar.set_postfix(errors=summary.error, tokens=summary.answer_tokens, refresh=False)
    if summary.success + summary.error + summary.skipped != summary.total:
        raise ViSpecError(
            f"the backend returned {summary.success} of {len(todo)} samples and went away; run the "
            "same command again"
        )


def _note(
    result: Regenerated | Rejected,
    settings: RegenerateSettings,
    journal: Journal,
    summary: Summary,
) -> None:
    """Write one result and count it."""
    if isinstance(result, Rejected):
        _reject(result, journal, summary)
        return
    if result.round_trip is False:
        summary.round_trip_failed += 1
        if settings.strict:
            reason = f"template round trip: {result.round_trip_reason}"
            _reject(Rejected(result.conversation.sample_id, reason), journal, summary)
            return
    journal.add(to_record(result, settings))
    summary.success += 1
    summary.round_trip_unchecked += result.round_trip is None
    summary.answers += len(result.answers)
    summary.answer_tokens += sum(len(answer.token_ids or ()) for answer in result.answers)
    summary.length += sum(answer.finish_reason == "length" for answer in result.answers)


def _reject(item: Rejected, journal: Journal, summary: Summary) -> None:
    journal.reject(item.sample_id, item.reason)
    summary.error += 1
    summary.reasons[reason_class(item.reason)] += 1


def reason_class(reason: str) -> str:
    """Return a reason without what is particular to the sample, for the summary."""
    return next((name for name in REASON_CLASSES if name in reason), "other")


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

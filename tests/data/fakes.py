"""Stand-ins for an engine: they speak the words that the tests want to hear."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_vispec.data.regenerate.dialogue import Answer, Dialogue, Regenerated
from vllm_vispec.data.regenerate.job import BackendName, Summary, regenerate_all
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.types import Conversation, Rejected
from vllm_vispec.utils.errors import ViSpecError

COUNT = 6


class Killed(BaseException):
    """The process ends here, whatever it was doing."""


def word_answer(dialogue: Dialogue) -> Answer:
    """Answer with the sample's id and the number of the turn."""
    text = f"{dialogue.source.sample_id} says {len(dialogue.answers)}"
    return Answer(text, "stop", (1, 2, 3), (9,))


@dataclass
class FakeBackend:
    """Answers in reverse order; dies before the answer number ``dies_at`` of its life."""

    speak: Callable[[Dialogue], Answer] = word_answer
    dies_at: int = -1
    refuses: bool = False
    asked: list[str] = field(default_factory=list)
    closed: int = 0

    def make(self, name: BackendName, settings: RegenerateSettings) -> FakeBackend:
        """Stand in for `make_backend`."""
        if self.refuses:
            raise ViSpecError("the engine does not start")
        self.request = settings.request
        return self

    def answer(self, conversations: Iterable[Conversation]) -> Iterator[Regenerated | Rejected]:
        """Answer everything."""
        for conversation in reversed(list(conversations)):
            if len(self.asked) == self.dies_at:
                raise Killed
            self.asked.append(conversation.sample_id)
            yield self._one(conversation)

    def _one(self, conversation: Conversation) -> Regenerated | Rejected:
        try:
            dialogue = Dialogue.begin(conversation, self.request)
            while not dialogue.accept(self.speak(dialogue), None):
                pass
        except ValueError as error:
            return Rejected(conversation.sample_id, str(error))
        return dialogue.finish(None)

    def close(self) -> None:
        """Count how often it was given back."""
        self.closed += 1


def record(name: str, **changes: Any) -> dict[str, Any]:
    """Return an input record with two questions."""
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "old"},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "old too"},
    ]
    return {"id": name, "family": "vqa", "image": "a.png", "conversations": turns} | changes


def changed(settings: RegenerateSettings, **changes: Any) -> RegenerateSettings:
    """Return the settings with other values."""
    return RegenerateSettings(**(dict(settings) | changes))


def run(settings: RegenerateSettings, backend: FakeBackend) -> Summary:
    """Run a job with a stand-in for the engine."""
    summary = regenerate_all(settings, make=backend.make)
    assert summary.total == summary.success + summary.error + summary.skipped
    return summary


def records(settings: RegenerateSettings) -> list[dict[str, Any]]:
    """Return what a job wrote."""
    return [json.loads(line) for line in settings.output.read_text().splitlines()]


def rejected(settings: RegenerateSettings) -> dict[str, str]:
    """Return the reasons of the samples that a job left out, by their ids."""
    text = Path(f"{settings.output}.rejected.jsonl").read_text()
    return {item["id"]: item["reason"] for item in map(json.loads, text.splitlines())}

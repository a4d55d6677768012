"""Child-process jobs that regenerate through a real engine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.support.engine import shut_down_distributed
from vllm_vispec.data.regenerate.dialogue import Regenerated
from vllm_vispec.data.regenerate.job import BackendName, regenerate_all
from vllm_vispec.data.regenerate.offline import OfflineBackend
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.types import Conversation, Rejected


class Shared:
    """One engine for several jobs; it notes the order in which samples were asked for."""

    def __init__(self, settings: RegenerateSettings) -> None:
        self.backend = OfflineBackend(settings)
        self.prompts: dict[str, tuple[int, ...] | None] = {}

    def make(self, name: BackendName, settings: RegenerateSettings) -> Shared:
        """Stand in for `make_backend`."""
        self.backend.settings = settings
        return self

    def answer(self, conversations: Iterable[Conversation]) -> Iterator[Regenerated | Rejected]:
        """Answer with the engine."""
        for result in self.backend.answer(conversations):
            if isinstance(result, Regenerated):
                prompt = result.answers[-1].prompt_token_ids
                self.prompts[result.conversation.sample_id] = prompt
            yield result

    def close(self) -> None:
        """Keep the engine for the next job."""


def to_settings(model: str, source: str, output: str, **changes: Any) -> RegenerateSettings:
    """Return the settings that all engine tests share."""
    return RegenerateSettings(
        target=model,
        input=Path(source),
        output=Path(output),
        prompt_style="detailed",
        max_tokens=24,
        seed=3,
        dtype="float32",
        max_model_len=400,
        engine={"max_num_seqs": 4, "enforce_eager": True},
        **changes,
    )


def run_twice(model: str, source: str, folder: str, **changes: Any) -> Iterator[dict[str, Any]]:
    """Run a job, cut its output in the middle of a line, and run it again with the same engine."""
    first = to_settings(model, source, f"{folder}/one.jsonl", **changes)
    shared = Shared(first)
    found = vars(regenerate_all(first, make=shared.make))
    yield found | {"records": records(first.output), "prompts": shared.prompts}
    again = to_settings(model, source, f"{folder}/two.jsonl", **changes)
    regenerate_all(again, make=shared.make)
    content = again.output.read_bytes()
    again.output.write_bytes(content[: len(content) // 2])
    yield vars(regenerate_all(again, make=shared.make)) | {"records": records(again.output)}
    shared.backend.close()
    shut_down_distributed()


def run_two(backend: BackendName, model: str, source: str, output: str) -> dict[str, Any]:
    """Run a job with two engines."""
    return vars(regenerate_all(to_settings(model, source, output, workers=2), backend))


def records(output: Path) -> dict[str, dict[str, Any]]:
    """Return the records of an output file by their ids."""
    return {item["id"]: item for item in map(json.loads, output.open())}

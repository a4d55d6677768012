"""Earlier answers of a dialogue that the target has to give itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

from vllm_vispec.bench.load import CHAT, chat_messages
from vllm_vispec.bench.schema import BenchSample
from vllm_vispec.bench.server import ServerError, call
from vllm_vispec.data.types import Part, Turn

TIMEOUT_S = 3600.0

Ask = Callable[[BenchSample], str]
"""Returns the greedy answer to the last question of a sample."""


def with_answers(samples: Sequence[BenchSample], ask: Ask) -> tuple[BenchSample, ...]:
    """Return the samples with an answer between any two questions."""
    return tuple(_answered(sample, ask) if sample.follow_up else sample for sample in samples)


def _answered(sample: BenchSample, ask: Ask) -> BenchSample:
    turns: list[Turn] = []
    for turn in sample.turns:
        if turns and turns[-1].role == turn.role == "user":
            answer = ask(replace(sample, turns=tuple(turns)))
            turns.append(Turn("assistant", (Part(text=answer),)))
        turns.append(turn)
    return replace(sample, turns=tuple(turns))


def ask_server(url: str, model: str) -> Ask:
    """Return a function that asks a running server, one question at a time.

    Raises:
        ServerError: (the function) the server refuses or is gone.
    """

    def ask(sample: BenchSample) -> str:
        body = {
            "model": model,
            "messages": chat_messages(sample),
            "temperature": 0,
            "max_completion_tokens": sample.max_tokens,
        }
        try:
            answer = call(url + CHAT, json.dumps(body).encode(), TIMEOUT_S)
        except OSError as error:
            raise ServerError(
                f"sample {sample.sample_id}: its earlier questions get no answer ({error})"
            ) from error
        return str(json.loads(answer)["choices"][0]["message"]["content"] or "")

    return ask

"""From conversations to the samples that are asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_vispec.bench.datasets.types import UNLABELLED, Adapter
from vllm_vispec.bench.schema import BenchSample
from vllm_vispec.data.types import Conversation, Rejected, Turn


def build_samples(
    items: Iterable[Conversation | Rejected], adapter: Adapter, max_tokens: int
) -> tuple[list[BenchSample], list[Rejected]]:
    """Return all samples of a dataset and the records that give none."""
    samples: list[BenchSample] = []
    rejected: list[Rejected] = []
    for item in items:
        if isinstance(item, Rejected):
            rejected.append(item)
            continue
        try:
            samples += to_samples(item, adapter, max_tokens)
        except ValueError as error:
            rejected.append(Rejected(item.sample_id, str(error)))
    return samples, rejected


def to_samples(conversation: Conversation, adapter: Adapter, max_tokens: int) -> list[BenchSample]:
    """Return one sample per question, or for the last question.

    A dialogue of several questions gives ids with the question's number: ``501#2``.

    Raises:
        ValueError: the dialogue cannot be asked, with the reason.
    """
    check_turns(conversation.turns)
    asked = [i for i, turn in enumerate(conversation.turns) if turn.role == "user"]
    numbers = range(len(asked)) if adapter.every_question else [len(asked) - 1]
    samples = []
    for number in numbers:
        turns = conversation.turns[: asked[number] + 1]
        if adapter.own_answers:
            turns = tuple(turn for turn in turns if turn.role != "assistant")
        name = conversation.sample_id
        name = name if len(asked) == 1 else f"{name}#{number + 1}"
        samples.append(BenchSample(name, conversation.family or UNLABELLED, turns, max_tokens))
    return samples


def check_turns(turns: Sequence[Turn]) -> None:
    """Refuse dialogues that a chat server would refuse or that leave nothing to answer.

    Raises:
        ValueError: with the reason.
    """
    asked = [turn for turn in turns if turn.role == "user"]
    if not asked:
        raise ValueError("no question")
    if turns[0].role == "assistant":
        raise ValueError("it begins with an answer")
    if any(not turn.text.strip() and not any(part.image for part in turn.parts) for turn in asked):
        raise ValueError("an empty question")
    if any(part.image for turn in turns if turn.role != "user" for part in turn.parts):
        raise ValueError("an image outside a question")

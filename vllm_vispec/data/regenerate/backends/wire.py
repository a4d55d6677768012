"""Conversations and results as JSON text, the form in which they travel between processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vllm_vispec.data.regenerate.dialogue import Answer, Regenerated
from vllm_vispec.data.types import Conversation, Part, Rejected, Turn


def conversation_to_json(conversation: Conversation) -> str:
    """Return a conversation as JSON; ``extra`` stays behind: nobody reads it any more."""
    return json.dumps(_conversation(conversation))


def conversation_from_json(text: str) -> Conversation:
    """Return the conversation that `conversation_to_json` wrote."""
    return _to_conversation(json.loads(text))


def result_to_json(result: Regenerated | Rejected) -> str:
    """Return a result as JSON."""
    if isinstance(result, Rejected):
        return json.dumps(asdict(result))
    return json.dumps(
        {
            "conversation": _conversation(result.conversation),
            "answers": [asdict(answer) for answer in result.answers],
            "round_trip": result.round_trip,
            "round_trip_reason": result.round_trip_reason,
        }
    )


def result_from_json(text: str) -> Regenerated | Rejected:
    """Return the result that `result_to_json` wrote."""
    data = json.loads(text)
    if "conversation" not in data:
        return Rejected(**data)
    answers = tuple(_to_answer(item) for item in data["answers"])
    conversation = _to_conversation(data["conversation"])
    return Regenerated(conversation, answers, data["round_trip"], data["round_trip_reason"])


def result_id(result: Regenerated | Rejected) -> str:
    """Return the id of a result's sample."""
    if isinstance(result, Rejected):
        return result.sample_id
    return result.conversation.sample_id


def _conversation(conversation: Conversation) -> dict[str, Any]:
    turns = [[turn.role, [asdict(part) for part in turn.parts]] for turn in conversation.turns]
    return {"id": conversation.sample_id, "turns": turns, "family": conversation.family}


def _to_conversation(data: Mapping[str, Any]) -> Conversation:
    turns = tuple(
        Turn(role, tuple(Part(**part) for part in parts)) for role, parts in data["turns"]
    )
    return Conversation(data["id"], turns, data["family"])


def _to_answer(data: Mapping[str, Any]) -> Answer:
    ids, prompt = data["token_ids"], data["prompt_token_ids"]
    return Answer(
        data["text"],
        data["finish_reason"],
        None if ids is None else tuple(ids),
        None if prompt is None else tuple(prompt),
    )

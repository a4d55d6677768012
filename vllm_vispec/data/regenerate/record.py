"""Regenerated dialogues as records of the output file (OpenAI style)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm_vispec.data.regenerate.dialogue import Regenerated
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.types import ANSWER_TOKENS_KEY, FINISH_KEY, Part


def to_record(done: Regenerated, settings: RegenerateSettings) -> dict[str, Any]:
    """Return the JSON record of a dialogue; its questions are those the target was asked."""
    conversation = done.conversation
    messages = [
        {"role": turn.role, "content": [_content(part, settings) for part in turn.parts]}
        for turn in conversation.turns
    ]
    sampling = settings.sampling
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
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "model": settings.target,
    }


def _content(part: Part, settings: RegenerateSettings) -> dict[str, str]:
    if part.image is None:
        return {"type": "text", "text": part.text}
    return {"type": "image", "image": output_image_path(part.image, settings)}


def output_image_path(path: str, settings: RegenerateSettings) -> str:
    """Return an image path for the output file.

    With an image root it stays as written (the reader of the output is given the same root).
    Without one, relative paths start from the folder of the file they are in, so they are made
    relative to the output's folder.
    """
    if settings.image_root is not None or Path(path).is_absolute() or path.startswith("file://"):
        return path
    return os.path.relpath(settings.input.parent / path, settings.output.parent)

"""MMSpec (arXiv 2603.14989): 600 samples in six task categories, multi-turn included.

A split is a folder with `mmspec.jsonl` and `images/`. A record has `id`, `image`, `turns` (the
questions, as strings), `category` (a label inside the task, not used here) and `topic` (the task).
These names are certain. Where published descriptions differ or are silent, this reader takes more:
an image path may start from `images/` or from the split's folder, `image` may be a list or missing
(text only), a question may stand alone under `prompt` or `question`, and a topic may be written
with spaces, hyphens or underscores. A topic outside the six becomes a family of its own.

As in MMSpec's own evaluation, every turn of a dialogue is measured, with the target's own answers
to the turns before it, behind Vicuna's system prompt, up to 1024 tokens. The full split of 600
records is therefore 723 samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm_vispec.bench.datasets.records import (
    CHAT_SYSTEM,
    Json,
    convert_each,
    find_image,
    first_of,
    read_lines,
    text_turn,
)
from vllm_vispec.bench.datasets.types import UNLABELLED, Adapter, DatasetOptions
from vllm_vispec.data.types import Conversation, Part, Rejected, Turn
from vllm_vispec.utils.errors import ViSpecError

FILE = "mmspec.jsonl"
QUESTIONS = ("turns", "prompt", "question")
IMAGES = ("image", "images")
TOPICS: Mapping[str, str] = MappingProxyType(
    {
        "general_vqa": "general_vqa",
        "text_vqa": "text_vqa",
        "image_captioning": "captioning",
        "chart_understanding": "charts",
        "chart_vqa": "charts",
        "complex_reasoning": "reasoning",
        "complex_reasoning_pro": "reasoning",
        "multi_turn": "multi_turn",
        "multi_turn_conversation": "multi_turn",
    }
)


def read(path: Path, options: DatasetOptions) -> Iterator[Conversation | Rejected]:
    """Yield the records of a split: its folder, or its JSONL file.

    Raises:
        ViSpecError: it is neither.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ViSpecError(
            f"dataset mmspec: {file} does not exist; give a split's folder with {FILE} and "
            "images/, e.g. dataset/MMSpec/testmini of a clone of github.com/killthefullmoon/MMSpec"
        )
    root = options.image_root
    folders = [root] if root is not None else [file.parent / "images", file.parent]
    return convert_each(read_lines(file), partial(to_conversation, folders=folders))


def to_conversation(record: Json, sample_id: str, folders: list[Path]) -> Conversation:
    """Return a record as a dialogue without answers, its images in the first question.

    Raises:
        ValueError: it has no question, or an image that is not there.
    """
    found = first_of(record, IMAGES)
    images = [find_image(str(item), folders) for item in _as_list(found)]
    questions = [_text(item) for item in _as_list(first_of(record, QUESTIONS))]
    if not questions:
        raise ValueError("no question")
    parts = (*(Part(image=image) for image in images), Part(text=questions[0]))
    turns = (
        text_turn("system", CHAT_SYSTEM),
        Turn("user", parts),
        *(text_turn("user", question) for question in questions[1:]),
    )
    return Conversation(sample_id, turns, family_of(record.get("topic")))


def family_of(topic: Any) -> str:
    """Return the task category of a topic."""
    name = re.sub(r"[^a-z0-9]+", "_", str(topic or "").lower()).strip("_")
    return TOPICS.get(name, name or UNLABELLED)


def _as_list(found: Any) -> list[Any]:
    if found is None:
        return []
    return found if isinstance(found, list) else [found]


def _text(item: Any) -> str:
    if not isinstance(item, str):
        raise ValueError(f"a question is not text but {type(item).__name__}")
    return item


ADAPTER = Adapter(
    name="mmspec",
    summary="a split of MMSpec: mmspec.jsonl and images/",
    read=read,
    max_tokens=1024,
    every_question=True,
    own_answers=True,
)

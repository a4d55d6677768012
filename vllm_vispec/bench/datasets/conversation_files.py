"""Conversation files, OpenAI or LLaVA style, and those of the tiny world among them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vllm_vispec.bench.datasets.types import Adapter, DatasetOptions
from vllm_vispec.data.images import image_file, image_folder
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.types import Conversation, Rejected, Turn
from vllm_vispec.utils.errors import ViSpecError

TINY_FILE = "questions.jsonl"
TINY_COMMAND = "python -m examples.tiny_vlm.questions --split heldout --start 100000 --count 60"


def read_file(path: Path, options: DatasetOptions) -> Iterator[Conversation | Rejected]:
    """Yield the dialogues of a conversation file, see `vllm_vispec.data`.

    Raises:
        ViSpecError: there is no such file.
    """
    if not path.is_file():
        raise ViSpecError(
            f"dataset openai: {path} is no file; give JSON lines with messages (OpenAI) or "
            "conversations (LLaVA), images as paths"
        )
    return _absolute(path, options.image_root)


def read_tiny(path: Path, options: DatasetOptions) -> Iterator[Conversation | Rejected]:
    """Yield the questions of the tiny world: the folder that was written, or its file.

    Raises:
        ViSpecError: there are none.
    """
    file = path / TINY_FILE if path.is_dir() else path
    if not file.is_file():
        folder = path if path.suffix == "" else path.parent
        raise ViSpecError(
            f"dataset tiny: {file} does not exist; write it with {TINY_COMMAND} --output {folder}"
        )
    return _absolute(file, options.image_root)


def _absolute(file: Path, image_root: Path | None) -> Iterator[Conversation | Rejected]:
    """Yield a file's records with absolute image paths."""
    folder = image_folder(file, image_root)
    for item in read_conversations(file, image_root):
        if isinstance(item, Rejected):
            yield item
        else:
            yield replace(item, turns=tuple(_with_folder(turn, folder) for turn in item.turns))


def _with_folder(turn: Turn, folder: Path) -> Turn:
    parts = (
        replace(part, image=str(image_file(part.image, folder).resolve())) if part.image else part
        for part in turn.parts
    )
    return replace(turn, parts=tuple(parts))


OPENAI = Adapter(
    name="openai",
    summary="a conversation file, OpenAI or LLaVA style; its last question is asked",
    read=read_file,
    max_tokens=256,
)
# The file's own answers are as terse as those of public question sets; the target's are not.
TINY = Adapter(
    name="tiny",
    summary="questions of the tiny world, from python -m examples.tiny_vlm.questions",
    read=read_tiny,
    max_tokens=256,
    every_question=True,
    own_answers=True,
)

"""Reading conversation files: JSON lines or one JSON array, records in LLaVA or OpenAI style.

A further style is a model in `RECORDS`, under the key by which it is known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, AliasPath, BaseModel, BeforeValidator, Field, ValidationError

from vllm_vispec.data.images import BadImage, image_file, image_folder
from vllm_vispec.data.shards import files_of
from vllm_vispec.data.types import Conversation, Part, Rejected, Turn
from vllm_vispec.utils.errors import ViSpecError

IMAGE_MARK = "<image>"
# The rest are what ShareGPT calls other assistants.
_LLAVA_ROLES = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant")

ImagePath = Annotated[str, Field(min_length=1)]


class _Record(BaseModel, extra="allow"):
    """What records of all styles may have; unknown fields are kept beside the conversation."""

    id: Any = None
    family: Any = None

    def to_turns(self) -> list[Turn]:
        """Return the turns.

        Raises:
            ValueError: marks and images do not agree.
        """
        raise NotImplementedError


class _LlavaTurn(BaseModel):
    speaker: Literal["human", "gpt", "chatgpt", "bing", "bard", "user", "assistant", "system"] = (
        Field(alias="from")
    )
    value: str


def _as_list(given: Any) -> Any:
    return [] if given is None else [given] if isinstance(given, str) else given


class _LlavaRecord(_Record):
    """``conversations`` with from / value, ``<image>`` marks, paths under ``image``."""

    conversations: list[_LlavaTurn]
    images: Annotated[list[ImagePath], BeforeValidator(_as_list)] = Field(
        default=[], validation_alias=AliasChoices("image", "images")
    )

    def to_turns(self) -> list[Turn]:
        """Split the text at its marks; images that it does not mention open the first question."""
        turns = [(_LLAVA_ROLES.get(t.speaker, t.speaker), t.value) for t in self.conversations]
        num_images, num_marks = len(self.images), sum(text.count(IMAGE_MARK) for _, text in turns)
        if num_images and not num_marks:
            first = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
            if first is None:
                raise ValueError("no question for the images")
            turns[first] = ("user", (IMAGE_MARK + "\n") * num_images + turns[first][1])
        elif num_marks != num_images:
            raise ValueError(f"{num_marks} {IMAGE_MARK} marks for {num_images} images")
        images = iter(self.images)
        return [Turn(role, _split_marks(text, images)) for role, text in turns]


def _split_marks(text: str, images: Iterator[str]) -> tuple[Part, ...]:
    """Split at the marks; the line break that goes with a mark is the template's business."""
    parts: list[Part] = []
    own = [next(images) for _ in range(text.count(IMAGE_MARK))]
    for piece, image in zip_longest(re.split(rf"\n?{IMAGE_MARK}\n?", text), own):
        parts += [Part(text=piece)] if piece else []
        parts += [Part(image=image)] if image else []
    return tuple(parts)


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class _Image(BaseModel):
    type: Literal["image"]
    image: ImagePath = Field(validation_alias=AliasChoices("image", "path"))


class _ImageUrl(BaseModel):
    type: Literal["image_url"]
    image: ImagePath = Field(
        validation_alias=AliasChoices(AliasPath("image_url", "url"), "image_url")
    )


def _as_parts(given: Any) -> Any:
    if isinstance(given, str):
        return [{"type": "text", "text": given}] if given else []
    return given


class _Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: Annotated[
        list[Annotated[_Text | _Image | _ImageUrl, Field(discriminator="type")]],
        BeforeValidator(_as_parts),
    ]


class _OpenAiRecord(_Record):
    """``messages`` with role and content, a string or a list of typed parts."""

    messages: list[_Message]

    def to_turns(self) -> list[Turn]:
        """See `_Record.to_turns`."""
        return [Turn(one.role, tuple(map(_to_part, one.content))) for one in self.messages]


def _to_part(part: _Text | _Image | _ImageUrl) -> Part:
    return Part(text=part.text) if isinstance(part, _Text) else Part(image=part.image)


RECORDS: Mapping[str, type[_Record]] = {"conversations": _LlavaRecord, "messages": _OpenAiRecord}


def read_conversations(
    path: Path, image_root: Path | None = None, *, check_images: bool = True
) -> Iterator[Conversation | Rejected]:
    """Yield, for every record of the file or of its shards, its conversation or why it is left out.

    Image paths stay as written; they start from ``image_root`` or the file's folder, and a record
    whose image is not there is rejected (unless ``check_images`` is off). A record without ``id``
    is called after its line. A second record with an id that was there before is rejected.

    Raises:
        ViSpecError: the file cannot be read or is one broken JSON array, or a shard is damaged.
    """
    folder = image_folder(path, image_root) if check_images else None
    seen: set[str] = set()
    for number, line_or_record in _records(path):
        item = _read_one(line_or_record, number, folder)
        if item.sample_id in seen:
            item = Rejected(
                f"{item.sample_id}#line{number}", f"id {item.sample_id} was there before"
            )
        seen.add(item.sample_id)
        yield item


def to_conversation(record: Any, sample_id: str) -> Conversation:
    """Return a record of any known style as a conversation.

    Raises:
        ValueError: with the reason, in one line.
    """
    if not isinstance(record, Mapping):
        raise ValueError("not a JSON object")
    model = next((model for key, model in RECORDS.items() if key in record), None)
    if model is None:
        raise ValueError(f"the record has no {' or '.join(RECORDS)}")
    try:
        found = model.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    turns = found.to_turns()
    if not turns:
        raise ValueError("no turns")
    return Conversation(sample_id, tuple(turns), str(found.family or ""), found.model_extra or {})


def _read_one(line_or_record: Any, number: int, folder: Path | None) -> Conversation | Rejected:
    sample_id = f"line{number}"
    try:
        is_line = isinstance(line_or_record, bytes)
        record = _parse(line_or_record) if is_line else line_or_record
        if isinstance(record, dict) and record.get("id") is not None:
            sample_id = str(record["id"])
        conversation = to_conversation(record, sample_id)
        for image in conversation.images if folder is not None else ():
            image_file(image, folder)
    except BadImage as error:
        return Rejected(sample_id, str(error))
    except ValueError as error:
        return Rejected(sample_id, f"line {number}: {error}")
    return conversation


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError("not JSON") from error


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number or position, undecoded line or parsed record) from 1 on."""
    number = 0
    try:
        for file in files_of(path) or [path]:
            with file.open("rb") as source:
                start = source.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
                source.seek(0)
                items: Iterable[Any] = _array(file, source.read()) if start == b"[" else source
                for item in items:
                    number += 1
                    if not isinstance(item, bytes) or item.strip():
                        yield number, item
    except OSError as error:
        raise ViSpecError(
            f"input {path} cannot be read ({error.strerror or error}): give a file of conversations"
        ) from error


def _array(path: Path, content: bytes) -> list[Any]:
    try:
        return list(_parse(content))
    except ValueError as error:
        raise ViSpecError(
            f"input {path} is no JSON array ({error}); use one record a line"
        ) from error

"""Reading conversation files of both styles, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_vispec.data.read import Rejected, read_conversations
from vllm_vispec.data.types import Conversation, Part, Turn
from vllm_vispec.utils.errors import ViSpecError

QUESTION = {"from": "human", "value": "<image>\nWhat is it?"}
REPLY = {"from": "gpt", "value": "A star."}
LLAVA = {"id": 7, "image": "a.png", "conversations": [QUESTION, REPLY]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"only its existence matters here")
    return tmp_path


def read(folder: Path, *records: Any) -> list[Conversation | Rejected]:
    file = folder / "in.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(read_conversations(file))


def reason(folder: Path, record: Any) -> str:
    (item,) = read(folder, record)
    assert isinstance(item, Rejected)
    return item.reason


def user(*parts: Part) -> Turn:
    return Turn("user", parts)


ANSWER = Turn("assistant", (Part(text="A star."),))


def test_llava(folder: Path) -> None:
    (found,) = read(folder, LLAVA | {"family": "vqa", "source": "mine"})
    assert isinstance(found, Conversation)
    assert found.sample_id == "7"
    assert found.family == "vqa"
    assert found.turns == (user(Part(image="a.png"), Part(text="What is it?")), ANSWER)
    assert dict(found.extra) == {"source": "mine"}


def test_llava_marks_decide_where_images_stand(folder: Path) -> None:
    first = {"from": "human", "value": "Compare <image> with\n<image>\nplease."}
    (found,) = read(
        folder, {"id": "x", "image": ["a.png", "b.png"], "conversations": [first, REPLY]}
    )
    assert isinstance(found, Conversation)
    assert found.turns[0] == user(
        Part(text="Compare "),
        Part(image="a.png"),
        Part(text=" with"),
        Part(image="b.png"),
        Part(text="please."),
    )
    assert found.images == ("a.png", "b.png")


def test_llava_image_without_a_mark_comes_first(folder: Path) -> None:
    system = {"from": "system", "value": "Be brief."}
    asked = {"from": "human", "value": "What is it?"}
    (found,) = read(folder, LLAVA | {"conversations": [system, asked, REPLY]})
    assert isinstance(found, Conversation)
    assert found.turns[0] == Turn("system", (Part(text="Be brief."),))
    assert found.turns[1] == user(Part(image="a.png"), Part(text="What is it?"))


def test_openai(folder: Path) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image", "image": "b.png"},
        {"type": "text", "text": "What is it?"},
    ]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A star."},
    ]
    (found,) = read(folder, {"id": "x", "messages": messages, "response_token_ids": [[1, 2]]})
    assert isinstance(found, Conversation)
    assert found.turns == (
        user(Part(image="a.png"), Part(image="b.png"), Part(text="What is it?")),
        ANSWER,
    )
    assert found.extra["response_token_ids"] == [[1, 2]]


def test_json_array_with_byte_order_mark(folder: Path) -> None:
    file = folder / "in.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps([LLAVA, LLAVA | {"id": 8}], indent=1).encode())
    assert [item.sample_id for item in read_conversations(file)] == ["7", "8"]


def test_image_root(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("elsewhere") / "in.jsonl"
    file.write_text(json.dumps(LLAVA))
    (missing,) = read_conversations(file)
    assert missing == Rejected("7", "image a.png does not exist")
    (found,) = read_conversations(file, folder)
    assert isinstance(found, Conversation)


def test_bad_lines_keep_their_numbers(folder: Path) -> None:
    file = folder / "in.jsonl"
    good = json.dumps(LLAVA | {"id": None}).encode()
    file.write_bytes(b"\n" + good + b'\n{"id": "cut", \n\xff\xfe\n[1]\n' + good + b"\n")
    items = list(read_conversations(file))
    assert [item.sample_id for item in items] == ["line2", "line3", "line4", "line5", "line6"]
    assert [item.reason for item in items if isinstance(item, Rejected)] == [
        "line 3: not JSON",
        "line 4: not UTF-8",
        "line 5: not a JSON object",
    ]


def test_duplicate_ids(folder: Path) -> None:
    first, second, other = read(folder, LLAVA, LLAVA, LLAVA | {"id": "8"})
    assert isinstance(first, Conversation)
    assert second == Rejected("7#line2", "id 7 was there before")
    assert isinstance(other, Conversation)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"image": "none.png"}, "image none.png does not exist"),
        ({"image": "http://x/a.png"}, "is not a path; save it as a file"),
        ({"image": 3}, "neither a path nor a list"),
        ({"image": ["a.png", "b.png"]}, "1 <image> marks for 2 images"),
        ({"image": None}, "1 <image> marks for 0 images"),
        ({"conversations": [], "image": None}, "no turns"),
        ({"conversations": {}}, "conversations is not a list"),
        ({"conversations": [{"from": "robot", "value": ""}]}, "unknown speaker 'robot'"),
        ({"conversations": [{"from": "human"}]}, "no text under value"),
        ({"conversations": [REPLY]}, "no question for the images"),
    ],
)
def test_bad_llava_records(folder: Path, change: dict[str, Any], expected: str) -> None:
    assert expected in reason(folder, LLAVA | change)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "tool", "content": ""}, "none of system, user, assistant"),
        ({"role": "user", "content": None}, "content is not a list"),
        ({"role": "user", "content": [{"type": "video"}]}, "unknown content part 'video'"),
        ({"role": "user", "content": ["text"]}, "unknown content part None"),
        ({"role": "user", "content": [{"type": "image"}]}, "of type image without image"),
    ],
)
def test_bad_openai_records(folder: Path, message: Any, expected: str) -> None:
    assert expected in reason(folder, {"id": "x", "messages": [message]})


def test_unknown_format(folder: Path) -> None:
    assert reason(folder, {"id": 1}) == "line 1: the record has no conversations or messages"


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ViSpecError, match="cannot be read"):
        list(read_conversations(tmp_path / "none.jsonl"))
    (tmp_path / "broken.json").write_text('[{"id": 1}, ')
    with pytest.raises(ViSpecError, match="is no JSON array"):
        list(read_conversations(tmp_path / "broken.json"))

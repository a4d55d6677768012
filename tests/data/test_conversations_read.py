"""Reading conversation files of both styles, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.types import Conversation, Part, Rejected, Turn
from vllm_vispec.utils.errors import ViSpecError

QUESTION = {"from": "human", "value": "<image>\nWhat is it?"}
REPLY = {"from": "gpt", "value": "A star."}
LLAVA = {"id": 7, "image": "a.png", "conversations": [QUESTION, REPLY]}
IMAGE, TEXT = Part(image="a.png"), Part(text="What is it?")
ANSWER = Turn("assistant", (Part(text="A star."),))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"only its existence matters here")
    return tmp_path


def read(folder: Path, *records: Any) -> list[Conversation | Rejected]:
    file = folder / "in.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(read_conversations(file))


def test_llava(folder: Path) -> None:
    found = read(folder, LLAVA | {"family": "vqa", "source": "mine"})
    turns = (Turn("user", (IMAGE, TEXT)), ANSWER)
    assert found == [Conversation("7", turns, "vqa", {"source": "mine"})]


def test_llava_marks_decide_where_images_stand(folder: Path) -> None:
    first = {"from": "human", "value": "Compare <image> with\n<image>\nplease."}
    record = {"image": ["a.png", "b.png"], "conversations": [first, REPLY]}
    (found,) = read(folder, record)
    assert isinstance(found, Conversation)
    parts = (Part("Compare "), IMAGE, Part(" with"), Part(image="b.png"), Part("please."))
    assert found.turns[0].parts == parts
    assert found.images == ("a.png", "b.png")


def test_llava_image_without_a_mark_comes_first(folder: Path) -> None:
    system = {"from": "system", "value": "Be brief."}
    asked = {"from": "human", "value": "What is it?"}
    reply = REPLY | {"from": "chatgpt"}  # ShareGPT's other assistants are assistants, too
    (found,) = read(folder, LLAVA | {"conversations": [system, asked, reply]})
    assert isinstance(found, Conversation)
    assert found.turns == (
        Turn("system", (Part("Be brief."),)),
        Turn("user", (IMAGE, TEXT)),
        ANSWER,
    )


def test_openai(folder: Path) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image", "image": "b.png"},
        {"type": "text", "text": "What is it?"},
    ]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A star."}]
    found = read(folder, {"id": "x", "messages": messages, "response_token_ids": [[1, 2]]})
    turns = (Turn("user", (IMAGE, Part(image="b.png"), TEXT)), ANSWER)
    assert found == [Conversation("x", turns, "", {"response_token_ids": [[1, 2]]})]


def test_json_array_with_byte_order_mark(folder: Path) -> None:
    file = folder / "in.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps([LLAVA, LLAVA | {"id": 8}], indent=1).encode())
    assert [item.sample_id for item in read_conversations(file)] == ["7", "8"]


def test_image_root(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("elsewhere") / "in.jsonl"
    file.write_text(json.dumps(LLAVA))
    assert list(read_conversations(file)) == [Rejected("7", "image a.png does not exist")]
    assert isinstance(next(read_conversations(file, folder)), Conversation)


def test_bad_lines_keep_their_numbers(folder: Path) -> None:
    file = folder / "in.jsonl"
    good = json.dumps(LLAVA | {"id": None}).encode()
    file.write_bytes(b"\n" + good + b'\n{"id": "cut", \n\xff\xfe\n[1]\n' + good + b"\n")
    items = list(read_conversations(file))
    assert [item.sample_id for item in items] == ["line2", "line3", "line4", "line5", "line6"]
    reasons = ["line 3: not JSON", "line 4: not UTF-8", "line 5: not a JSON object"]
    assert [item.reason for item in items if isinstance(item, Rejected)] == reasons


def test_duplicate_ids(folder: Path) -> None:
    first, second, other = read(folder, LLAVA, LLAVA, LLAVA | {"id": "8"})
    assert isinstance(first, Conversation)
    assert second == Rejected("7#line2", "id 7 was there before")
    assert isinstance(other, Conversation)


def openai(content: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (LLAVA | {"image": "none.png"}, "image none.png does not exist"),
        (LLAVA | {"image": "http://x/a.png"}, "is not a path; save it as a file"),
        (LLAVA | {"image": 3}, "line 1: image: Input should be a valid list"),
        (LLAVA | {"image": ["a.png", "b.png"]}, "1 <image> marks for 2 images"),
        (LLAVA | {"image": None}, "1 <image> marks for 0 images"),
        ({"conversations": []}, "no turns"),
        ({"conversations": {}}, "conversations: Input should be a valid list"),
        ({"conversations": [{"from": "robot", "value": ""}]}, "conversations.0.from: Input should"),
        ({"conversations": [{"from": "human"}]}, "conversations.0.value: Field required"),
        (LLAVA | {"conversations": [REPLY]}, "no question for the images"),
        (openai("", role="tool"), "messages.0.role: Input should be 'system', 'user' or"),
        (openai(None), "messages.0.content: Input should be a valid list"),
        (openai([{"type": "video"}]), "messages.0.content.0: Input tag 'video'"),
        (openai(["text"]), "messages.0.content.0: Input should be a valid dictionary"),
        (openai([{"type": "image"}]), "messages.0.content.0.image.image: Field required"),
        ({"id": 1}, "line 1: the record has no conversations or messages"),
    ],
)
def test_bad_records(folder: Path, record: dict[str, Any], expected: str) -> None:
    (item,) = read(folder, record)
    assert isinstance(item, Rejected)
    assert expected in item.reason


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ViSpecError, match="cannot be read"):
        list(read_conversations(tmp_path / "none.jsonl"))
    (tmp_path / "broken.json").write_text('[{"id": 1}, ')
    with pytest.raises(ViSpecError, match="is no JSON array"):
        list(read_conversations(tmp_path / "broken.json"))

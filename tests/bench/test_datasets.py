"""MMSpec and conversation files as datasets, and what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench.dataset_files import by_id, picture, rejections, write_lines
from vllm_vispec.bench.datasets import (
    ADAPTERS,
    CATEGORIES,
    load_dataset,
)
from vllm_vispec.bench.public_sets import CHAT_SYSTEM, UNLABELLED
from vllm_vispec.bench.schema import BenchSample
from vllm_vispec.data.types import Part, Turn
from vllm_vispec.utils.errors import ViSpecError

TOPICS = {
    "general vqa": "general_vqa",
    "text vqa": "text_vqa",
    "image captioning": "captioning",
    "chart understanding": "charts",
    "complex reasoning pro": "reasoning",
    "multi-turn conversation": "multi_turn",
}


def mmspec_record(number: int, topic: str, *questions: str, **other: Any) -> dict[str, Any]:
    return {
        "id": f"mmspec_{number:03}",
        "image": f"mmspec_{number:03}.png",
        "turns": list(questions),
        "category": "default",
        "topic": topic,
        **other,
    }


@pytest.fixture
def mmspec(tmp_path: Path) -> Path:
    """One record per topic, the last one with three turns."""
    records = []
    for number, topic in enumerate(TOPICS, start=1):
        picture(tmp_path / "images" / f"mmspec_{number:03}.png")
        questions = ("One?", "Two?", "Three?") if number == len(TOPICS) else ("One?",)
        records.append(mmspec_record(number, topic, *questions))
    write_lines(tmp_path / "mmspec.jsonl", *records)
    return tmp_path


def test_mmspec(mmspec: Path) -> None:
    dataset = load_dataset("mmspec", mmspec)
    samples = by_id(dataset)
    assert len(samples) == 8
    assert {sample.family for sample in samples.values()} == set(CATEGORIES)
    assert not dataset.rejected
    image = str((mmspec / "images" / "mmspec_001.png").resolve())
    assert samples["mmspec_001"] == BenchSample(
        "mmspec_001",
        "general_vqa",
        (
            Turn("system", (Part(text=CHAT_SYSTEM),)),
            Turn("user", (Part(image=image), Part(text="One?"))),
        ),
        1024,
    )


def test_mmspec_measures_every_turn(mmspec: Path) -> None:
    samples = by_id(load_dataset("mmspec", mmspec / "mmspec.jsonl"))
    turns = [samples[f"mmspec_006#{number}"].turns for number in (1, 2, 3)]
    assert [len(asked) for asked in turns] == [2, 3, 4]
    assert [turn.text for turn in turns[2][1:]] == ["One?", "Two?", "Three?"]
    assert [samples[f"mmspec_006#{number}"].follow_up for number in (1, 2, 3)] == [
        False,
        True,
        True,
    ]
    assert {samples[f"mmspec_006#{number}"].images[0] for number in (1, 2, 3)} == {
        str((mmspec / "images" / "mmspec_006.png").resolve())
    }


def test_unusable_records_are_counted_with_reasons(mmspec: Path) -> None:
    file = mmspec / "mmspec.jsonl"
    (mmspec / "images" / "broken.png").write_bytes(b"no picture")
    bad = [
        "{",
        [1],
        mmspec_record(20, "text vqa", "Q?", image="nowhere.png"),
        mmspec_record(21, "text vqa", "Q?", image="https://example.com/a.png"),
        mmspec_record(22, "text vqa", image=None),
        mmspec_record(23, "text vqa", image=None, turns=[7]),
        mmspec_record(24, "text vqa", "  ", image=None),
        mmspec_record(1, "text vqa", "Q?"),
        mmspec_record(25, "text vqa", "Q?", image="broken.png"),
    ]
    lines = [line if isinstance(line, str) else json.dumps(line) for line in bad]
    file.write_text(file.read_text() + "\n" + "\n".join(lines) + "\n")
    dataset = load_dataset("mmspec", mmspec)
    assert len(dataset.samples) == 8
    found = rejections(dataset)
    assert found.pop("mmspec_025").startswith("image ")
    assert found == {
        "line8": "not JSON",
        "line9": "not a JSON object",
        "mmspec_020": "image nowhere.png does not exist",
        "mmspec_021": "image https://example.com/a.png is not a path; save it as a file",
        "mmspec_022": "no question",
        "mmspec_023": "a question is not text but int",
        "mmspec_024": "an empty question",
        "mmspec_001 (line15)": "a record with this id was there before",
    }
    assert sum(dataset.reasons().values()) == 9
    notes = dataset.notes()
    assert notes[0].startswith("dataset mmspec: 8 samples (captioning 1, ")
    assert notes[1] == "  9 cannot be used:"
    assert len(notes) == 2 + 5


def test_missing_files_say_what_is_expected(tmp_path: Path) -> None:
    expected = {
        "mmspec": r"nothing does not exist.* mmspec.jsonl and images/.*killthefullmoon/MMSpec",
        "openai": r"is no file; give JSON lines",
        "tiny": r"python -m examples.tiny_vlm.questions .* --output",
        "vispec": r"lacks sqa/problems.json .*ScienceQA.*; seed/llava-seed-bench.jsonl",
    }
    assert expected.keys() == ADAPTERS.keys()
    for name, message in expected.items():
        with pytest.raises(ViSpecError, match=f"dataset {name}: .*{message}"):
            load_dataset(name, tmp_path / "nothing")
    with pytest.raises(ViSpecError, match="dataset coco is unknown; there are mmspec, vispec"):
        load_dataset("coco", tmp_path)


def openai_record(name: str, *texts: str, image: str | None = None) -> dict[str, Any]:
    """Messages of the user and the assistant in turns."""
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(texts)
    ]
    if image:
        text = {"type": "text", "text": texts[0]}
        messages[0]["content"] = [{"type": "image_url", "image_url": {"url": image}}, text]
    return {"id": name, "family": "vqa", "messages": messages}


def test_openai_asks_the_last_question_behind_the_recorded_answers(tmp_path: Path) -> None:
    image = picture(tmp_path / "a.png")
    llava = {
        "id": "llava",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}],
    }
    records = (openai_record("one", "Q1?", "A1.", "Q2?", "A2.", image="a.png"), llava)
    samples = by_id(load_dataset("openai", write_lines(tmp_path / "in.jsonl", *records)))
    one = samples["one#2"]
    assert [turn.text for turn in one.turns] == ["Q1?", "A1.", "Q2?"]
    assert (one.family, one.images, one.max_tokens) == ("vqa", (str(image.resolve()),), 256)
    assert not one.follow_up
    asked = (Part(image=str(image.resolve())), Part(text="What is it?"))
    assert samples["llava"].turns == (Turn("user", asked),)
    assert samples["llava"].family == UNLABELLED

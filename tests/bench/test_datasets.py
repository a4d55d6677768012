"""Datasets: what is read, chosen, resized, and why records are left out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vllm_vispec.bench.datasets import (
    ADAPTERS,
    CATEGORIES,
    DatasetOptions,
    LoadedDataset,
    load_dataset,
    with_square_images,
    without_images,
)
from vllm_vispec.bench.public_sets import (
    CHAT_SYSTEM,
    DESCRIBE,
    EXPLAIN,
    READ_TEXT,
    TASKS,
    UNLABELLED,
)
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
    assert not dataset.rejected
    assert {sample.family for sample in samples.values()} == set(CATEGORIES)
    image = str((mmspec / "images" / "mmspec_001.png").resolve())
    system = Turn("system", (Part(text=CHAT_SYSTEM),))
    turns = (system, Turn("user", (Part(image=image), Part(text="One?"))))
    assert samples["mmspec_001"] == BenchSample("mmspec_001", "general_vqa", turns, 1024)
    # Every turn of a dialogue is measured.
    assert len(samples) == 8
    dialogue = [samples[f"mmspec_006#{number}"] for number in (1, 2, 3)]
    assert [len(one.turns) for one in dialogue] == [2, 3, 4]
    assert [turn.text for turn in dialogue[2].turns[1:]] == ["One?", "Two?", "Three?"]
    assert [one.follow_up for one in dialogue] == [False, True, True]
    assert [len(one.images) for one in dialogue] == [1, 1, 1]
    assert by_id(load_dataset("mmspec", mmspec / "mmspec.jsonl")) == samples


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


def picture(file: Path, size: tuple[int, int] = (8, 6), color: str = "red") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(file)
    return file


def write_lines(file: Path, *records: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return file


def write_json(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), "utf-8")
    return file


def by_id(dataset: LoadedDataset) -> dict[str, BenchSample]:
    return {sample.sample_id: sample for sample in dataset.samples}


def rejections(dataset: LoadedDataset) -> dict[str, str]:
    return {item.sample_id: item.reason for item in dataset.rejected}


def tiny_record(number: int, family: str, questions: int = 1) -> dict[str, Any]:
    """As examples.tiny_vlm.questions writes them."""
    messages: list[dict[str, Any]] = []
    for turn in range(questions):
        content: list[dict[str, str]] = [{"type": "text", "text": f"Question {turn}?"}]
        if turn == 0:
            content.insert(0, {"type": "image", "image": f"images/{number}.png"})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": "red circle"})
    return {"id": f"heldout-{number}", "family": family, "messages": messages}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Five records of each category."""
    records = []
    for number in range(30):
        family = CATEGORIES[number % len(CATEGORIES)]
        picture(tmp_path / "images" / f"{number}.png")
        records.append(tiny_record(number, family, 2 if family == "multi_turn" else 1))
    write_lines(tmp_path / "questions.jsonl", *records)
    return tmp_path


def test_tiny(tiny: Path) -> None:
    dataset = load_dataset("tiny", tiny)
    families = Counter(sample.family for sample in dataset.samples)
    assert families == {name: 10 if name == "multi_turn" else 5 for name in CATEGORIES}
    # The terse recorded answers are left out: the target's own stand there.
    last = by_id(dataset)["heldout-5#2"]
    assert [turn.role for turn in last.turns] == ["user", "user"]
    assert last.follow_up
    assert dataset == load_dataset("tiny", tiny / "questions.jsonl")


def test_limit_takes_the_families_in_turns(tiny: Path) -> None:
    dataset = load_dataset("tiny", tiny, DatasetOptions(limit=12))
    families = [sample.family for sample in dataset.samples]
    assert families == sorted(CATEGORIES) * 2
    assert dataset.not_chosen == 35 - 12
    assert "  23 more were not chosen" in dataset.notes()


def test_choice_is_stable(tiny: Path) -> None:
    small = load_dataset("tiny", tiny, DatasetOptions(limit=6)).samples
    large = load_dataset("tiny", tiny, DatasetOptions(limit=18)).samples
    assert large[:6] == small
    assert load_dataset("tiny", tiny).samples[:18] == large
    other = load_dataset("tiny", tiny, DatasetOptions(limit=6, seed=1)).samples
    assert {sample.sample_id for sample in other} != {sample.sample_id for sample in small}
    # A family's order does not depend on what else is in the file.
    file = tiny / "questions.jsonl"
    kept = [line for line in file.read_text().splitlines() if '"charts"' in line]
    write_lines(tiny / "charts.jsonl", *reversed(kept))
    alone = load_dataset("tiny", tiny / "charts.jsonl").samples
    mixed = load_dataset("tiny", tiny).samples
    assert list(alone) == [sample for sample in mixed if sample.family == "charts"]


def test_wanted_families(tiny: Path) -> None:
    options = DatasetOptions(families=("charts", "reasoning"), limit=3, max_tokens=7)
    samples = load_dataset("tiny", tiny, options).samples
    assert [sample.family for sample in samples] == ["charts", "reasoning", "charts"]
    assert {sample.max_tokens for sample in samples} == {7}
    with pytest.raises(
        ViSpecError, match=r"family maps has no usable sample.*; there are general_"
    ):
        load_dataset("tiny", tiny, DatasetOptions(families=("maps", "charts")))


def test_an_unreadable_image_makes_room_for_the_next_sample(tiny: Path) -> None:
    options = DatasetOptions(families=("charts",), limit=2)
    first = load_dataset("tiny", tiny, options).samples[0]
    Path(first.images[0]).write_bytes(b"no picture")
    dataset = load_dataset("tiny", tiny, options)
    assert len(dataset.samples) == 2
    assert list(rejections(dataset)) == [first.sample_id]


@pytest.fixture
def vispec(tmp_path: Path) -> Path:
    """Every task in the form in which it is published, with one usable question."""
    llava = {"question_id": 7, "text": "Is it red?\nAnswer with one word."}
    science = {"question": "Which?", "choices": ["x", "y"], "hint": "", "split": "test"}
    flat = {
        "mme/llava_mme.jsonl": [
            llava | {"image": "posters/a.png"},
            llava | {"image": "posters/a.png", "text": "Is it blue?"},
        ],
        "gqa/llava_gqa_testdev_balanced.jsonl": [llava | {"image": "a.png"}],
        "seed/llava-seed-bench.jsonl": [
            llava | {"image": "SEED-Bench-image/a.png"},
            llava | {"question_id": 8, "image": "SEED-Bench-video/b.png"},
        ],
    }
    whole = {
        "sqa/problems.json": {
            "5": science | {"image": "image.png"},
            "6": science | {"image": None},
            "9": science | {"image": "image.png", "split": "train"},
        },
        "mmvet/mm-vet.json": {"v1_0": {"imagename": "v1_0.png", "question": "What is x?"}},
        "textvqa/TextVQA_0.5.1_val.json": {
            "data": [{"question_id": 34602, "image_id": "a", "question": "What brand?"}]
        },
        "coco/dataset_coco.json": {
            "images": [
                {"cocoid": 1, "filepath": "val2014", "filename": "a.png", "split": "test"},
                {"cocoid": 2, "filepath": "val2014", "filename": "b.png", "split": "train"},
            ]
        },
        "vizwiz/test.json": [{"image": "a.png", "question": "What is this?"}],
    }
    for name, records in flat.items():
        write_lines(tmp_path / name, *records)
    for name, content in whole.items():
        write_json(tmp_path / name, content)
    images = (
        "mme/MME_Benchmark_release_version/MME_Benchmark/posters/a.png",
        "gqa/images/a.png",
        "seed/SEED-Bench-image/a.png",
        "sqa/images/test/5/image.png",
        "mmvet/images/v1_0.png",
        "coco/val2014/a.png",
        "vizwiz/test/a.png",
    )
    for image in images:
        picture(tmp_path / image)
    picture(tmp_path / "textvqa/train_images/any.png").rename(
        tmp_path / "textvqa/train_images/a.jpg"
    )
    return tmp_path


def test_vispec_reads_the_published_files(vispec: Path) -> None:
    dataset = load_dataset("vispec", vispec)
    assert not dataset.rejected
    families = Counter(sample.family for sample in dataset.samples)
    assert families == {name: 2 if name == "mme" else 1 for name in TASKS}
    assert {sample.max_tokens for sample in dataset.samples} == {1024}
    said: dict[str, list[list[str]]] = {}
    for sample in sorted(dataset.samples, key=lambda sample: sample.sample_id):
        system, question = sample.turns
        assert (system.role, system.text) == ("system", CHAT_SYSTEM)
        # As in the paper's scripts, the image stands behind the text.
        assert question.parts[-1].image is not None
        texts = [part.text for part in question.parts[:-1]]
        said.setdefault(sample.family, []).append(texts)
    assert said == {
        "sqa": [
            [
                "Context: N/A\nQuestion: Which?\nOptions: (A) x (B) y\n"
                'Your answer should begin with "The answer is". ' + EXPLAIN + " Answer:"
            ]
        ],
        "mmvet": [["What is x?", EXPLAIN]],
        "textvqa": [["What brand?", READ_TEXT]],
        "mme": [["Is it red?", EXPLAIN], ["Is it blue?", EXPLAIN]],
        "coco": [[DESCRIBE]],
        "vizwiz": [["What is this?", EXPLAIN]],
        "gqa": [["Is it red?", EXPLAIN]],
        "seed": [["Is it red?", EXPLAIN]],
    }
    ids = {sample.sample_id for sample in dataset.samples}
    assert {"sqa/5", "mmvet/v1_0", "textvqa/34602", "coco/1", "vizwiz/row1", "seed/7"} < ids
    assert {"mme/line1", "mme/line2"} < ids


def test_vispec_says_what_is_missing_unless_it_is_not_wanted(vispec: Path) -> None:
    (vispec / "gqa" / "llava_gqa_testdev_balanced.jsonl").unlink()
    with pytest.raises(ViSpecError) as caught:
        load_dataset("vispec", vispec)
    assert str(caught.value) == (
        f"dataset vispec: {vispec} lacks gqa/llava_gqa_testdev_balanced.jsonl (or "
        "gqa/questions.jsonl) with its images [GQA: llava_gqa_testdev_balanced.jsonl of "
        "LLaVA's eval.zip, images.zip of cs.stanford.edu/people/dorarad/gqa]. Fetch what is "
        "missing, or name the tasks that are there as families"
    )
    samples = load_dataset("vispec", vispec, DatasetOptions(families=("mme", "coco"))).samples
    assert [sample.family for sample in samples] == ["coco", "mme", "mme"]
    with pytest.raises(ViSpecError, match="family charts is no task of dataset vispec; it has sqa"):
        load_dataset("vispec", vispec, DatasetOptions(families=("charts",)))


def test_vispec_takes_files_of_ones_own(vispec: Path) -> None:
    picture(vispec / "sqa" / "images" / "own.png")
    write_lines(
        vispec / "sqa" / "questions.jsonl",
        {"id": "a", "image": "own.png", "question": "Q?", "choices": ["x"], "hint": "H"},
        {"id": "b", "image": "own.png", "question": "Q?"},
        {"id": "c", "image": "gone.png", "question": "Q?", "choices": ["x"]},
    )
    write_lines(vispec / "coco" / "questions.jsonl", {"image": "val2014/a.png"})
    dataset = load_dataset("vispec", vispec, DatasetOptions(families=("sqa", "coco")))
    samples = by_id(dataset)
    assert samples.keys() == {"sqa/a", "coco/line1"}
    assert samples["sqa/a"].turns[1].text.startswith("Context: H\nQuestion: Q?\nOptions: (A) x\n")
    assert rejections(dataset) == {
        "sqa/b": "no choices",
        "sqa/c": "image gone.png does not exist",
    }


@pytest.fixture
def sample(tmp_path: Path) -> BenchSample:
    images = [picture(tmp_path / "in" / f"{color}.png", color=color) for color in ("red", "blue")]
    parts = (Part(text="Compare"), *(Part(image=str(image)) for image in images))
    turns = (Turn("system", (Part(text="Be brief."),)), Turn("user", parts))
    return BenchSample("x", "vqa", turns, 16)


def test_resized_copies(sample: BenchSample, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = [Path(image).read_bytes() for image in sample.images]
    resized = with_square_images(sample, 28, out)
    opened = [Image.open(image) for image in resized.images]
    assert [image.size for image in opened] == [(28, 28)] * 2
    assert [image.getpixel((5, 5)) for image in opened] == [(255, 0, 0), (0, 0, 255)]
    assert [Path(image).read_bytes() for image in sample.images] == before
    # All but the images is as it was.
    assert replace(resized, turns=sample.turns) == sample
    assert [turn.text for turn in resized.turns] == [turn.text for turn in sample.turns]
    # They are made once per content and size.
    stamps = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert with_square_images(sample, 28, out) == resized
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == stamps
    with_square_images(sample, 56, out)
    assert len(list(out.iterdir())) == 4


def test_an_image_that_cannot_be_resized(sample: BenchSample, tmp_path: Path) -> None:
    Path(sample.images[0]).write_bytes(b"no picture")
    with pytest.raises(ViSpecError, match=r"cannot be read.*remove its record"):
        with_square_images(sample, 28, tmp_path / "out")


def test_without_images(sample: BenchSample) -> None:
    text = without_images(sample)
    assert text.images == ()
    assert [turn.text for turn in text.turns] == ["Be brief.", "Compare"]
    only_image = replace(sample, turns=(Turn("user", sample.turns[1].parts[1:]),))
    assert without_images(only_image).turns == (Turn("user", (Part(text="(no image)"),)),)

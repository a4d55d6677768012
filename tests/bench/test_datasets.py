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

TOPICS = (
    "general vqa",
    "text vqa",
    "image captioning",
    "chart understanding",
    "complex reasoning pro",
    "multi-turn conversation",
)


def picture(file: Path, color: str = "red") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), color).save(file)
    return file


def write(file: Path, *records: Any) -> Path:
    """Write JSON lines, or the only record as JSON; a text is a line as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


def by_id(dataset: LoadedDataset) -> dict[str, BenchSample]:
    return {sample.sample_id: sample for sample in dataset.samples}


def rejections(dataset: LoadedDataset) -> dict[str, str]:
    return {item.sample_id: item.reason for item in dataset.rejected}


def mmspec_record(number: int, topic: str, *questions: str, **other: Any) -> dict[str, Any]:
    name = f"mmspec_{number:03}"
    return {"id": name, "image": f"{name}.png", "turns": questions, "topic": topic, **other}


@pytest.fixture
def mmspec(tmp_path: Path) -> Path:
    """One record per topic, the last one with three turns."""
    records = []
    for number, topic in enumerate(TOPICS, start=1):
        picture(tmp_path / "images" / f"mmspec_{number:03}.png")
        questions = ("One?", "Two?", "Three?") if number == len(TOPICS) else ("One?",)
        records.append(mmspec_record(number, topic, *questions))
    write(tmp_path / "mmspec.jsonl", *records)
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
    write(file, file.read_text(), *bad)
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


def test_openai_asks_the_last_question_behind_the_recorded_answers(tmp_path: Path) -> None:
    image = str(picture(tmp_path / "a.png").resolve())
    texts = [{"role": "user", "content": "Q1?"}, {"role": "assistant", "content": "A1."}]
    shown = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "Q2?"}]
    messages = [*texts, {"role": "user", "content": shown}, texts[1]]
    asked = [{"from": "human", "value": "<image>\nWhat is it?"}]
    file = write(
        tmp_path / "in.jsonl",
        {"id": "one", "family": "vqa", "messages": messages},
        {"id": "llava", "image": "a.png", "conversations": asked},
    )
    samples = by_id(load_dataset("openai", file))
    one = samples["one#2"]
    assert [turn.text for turn in one.turns] == ["Q1?", "A1.", "Q2?"]
    assert (one.family, one.images, one.max_tokens) == ("vqa", (image,), 256)
    assert not one.follow_up
    assert samples["llava"].turns == (Turn("user", (Part(image=image), Part("What is it?"))),)
    assert samples["llava"].family == UNLABELLED


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Five records of each category, as examples.tiny_vlm.questions writes them."""
    records = []
    for number in range(30):
        family = CATEGORIES[number % len(CATEGORIES)]
        picture(tmp_path / "images" / f"{number}.png")
        image, text = {"type": "image", "image": f"images/{number}.png"}, {"type": "text"}
        answer = {"role": "assistant", "content": "red circle"}
        turns = [{"role": "user", "content": [image, {**text, "text": "Question 0?"}]}, answer]
        if family == "multi_turn":
            turns += [{"role": "user", "content": "Question 1?"}, answer]
        records.append({"id": f"heldout-{number}", "family": family, "messages": turns})
    write(tmp_path / "questions.jsonl", *records)
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


def test_limit_takes_the_families_in_turns_and_stays_stable(tiny: Path) -> None:
    small = load_dataset("tiny", tiny, DatasetOptions(limit=6)).samples
    dataset = load_dataset("tiny", tiny, DatasetOptions(limit=12))
    assert [sample.family for sample in dataset.samples] == sorted(CATEGORIES) * 2
    assert "  23 more were not chosen" in dataset.notes()
    assert dataset.samples[:6] == small
    assert load_dataset("tiny", tiny).samples[:12] == dataset.samples
    other = load_dataset("tiny", tiny, DatasetOptions(limit=6, seed=1)).samples
    assert {sample.sample_id for sample in other} != {sample.sample_id for sample in small}
    # A family's order does not depend on what else is in the file.
    kept = [
        line for line in (tiny / "questions.jsonl").read_text().splitlines() if "charts" in line
    ]
    alone = load_dataset("tiny", write(tiny / "charts.jsonl", *reversed(kept))).samples
    mixed = load_dataset("tiny", tiny).samples
    assert list(alone) == [sample for sample in mixed if sample.family == "charts"]


def test_wanted_families(tiny: Path) -> None:
    options = DatasetOptions(families=("charts", "reasoning"), limit=3, max_tokens=7)
    samples = load_dataset("tiny", tiny, options).samples
    assert [sample.family for sample in samples] == ["charts", "reasoning", "charts"]
    assert {sample.max_tokens for sample in samples} == {7}
    with pytest.raises(ViSpecError, match=r"family maps has no usable sample.*; there are gener"):
        load_dataset("tiny", tiny, DatasetOptions(families=("maps", "charts")))


def test_an_unreadable_image_makes_room_for_the_next_sample(tiny: Path) -> None:
    options = DatasetOptions(families=("charts",), limit=2)
    first = load_dataset("tiny", tiny, options).samples[0]
    Path(first.images[0]).write_bytes(b"no picture")
    dataset = load_dataset("tiny", tiny, options)
    assert len(dataset.samples) == 2
    assert list(rejections(dataset)) == [first.sample_id]


LLAVA = {"question_id": 7, "text": "Is it red?\nAnswer with one word."}
SCIENCE = {"question": "Which?", "choices": ["x", "y"], "hint": "", "split": "test"}
COCO = {"filepath": "val2014", "filename": "a.png"}
PUBLISHED: dict[str, list[Any]] = {
    "mme/llava_mme.jsonl": [
        LLAVA | {"image": "posters/a.png"},
        LLAVA | {"image": "posters/a.png", "text": "Is it blue?"},
    ],
    "gqa/llava_gqa_testdev_balanced.jsonl": [LLAVA | {"image": "a.png"}],
    "seed/llava-seed-bench.jsonl": [
        LLAVA | {"image": "SEED-Bench-image/a.png"},
        LLAVA | {"question_id": 8, "image": "SEED-Bench-video/b.png"},
    ],
    "sqa/problems.json": [
        {
            "5": SCIENCE | {"image": "image.png"},
            "6": SCIENCE | {"image": None},
            "9": SCIENCE | {"image": "image.png", "split": "train"},
        }
    ],
    "mmvet/mm-vet.json": [{"v1_0": {"imagename": "v1_0.png", "question": "What is x?"}}],
    "textvqa/TextVQA_0.5.1_val.json": [
        {"data": [{"question_id": 34602, "image_id": "a", "question": "What brand?"}]}
    ],
    "coco/dataset_coco.json": [
        {"images": [COCO | {"cocoid": 1, "split": "test"}, COCO | {"cocoid": 2, "split": "train"}]}
    ],
    "vizwiz/test.json": [[{"image": "a.png", "question": "What is this?"}]],
}
IMAGES = (
    "mme/MME_Benchmark_release_version/MME_Benchmark/posters/a.png",
    "gqa/images/a.png",
    "seed/SEED-Bench-image/a.png",
    "sqa/images/test/5/image.png",
    "mmvet/images/v1_0.png",
    "coco/val2014/a.png",
    "vizwiz/test/a.png",
    "textvqa/train_images/a.jpg",
)


@pytest.fixture
def vispec(tmp_path: Path) -> Path:
    """Every task in the form in which it is published, with one usable question."""
    for name, records in PUBLISHED.items():
        write(tmp_path / name, *records)
    for image in IMAGES:
        picture(tmp_path / image)
    return tmp_path


def test_vispec_reads_the_published_files(vispec: Path) -> None:
    dataset = load_dataset("vispec", vispec)
    assert not dataset.rejected
    assert {sample.max_tokens for sample in dataset.samples} == {1024}
    asked: dict[str, list[str]] = {}
    for name, sample in by_id(dataset).items():
        system, question = sample.turns
        assert (system.role, system.text) == ("system", CHAT_SYSTEM)
        # As in the paper's scripts, the image stands behind the text.
        assert question.parts[-1].image is not None
        assert sample.family == name.partition("/")[0]
        asked[name] = [part.text for part in question.parts[:-1]]
    assert asked == {
        "sqa/5": [
            "Context: N/A\nQuestion: Which?\nOptions: (A) x (B) y\n"
            'Your answer should begin with "The answer is". ' + EXPLAIN + " Answer:"
        ],
        "mmvet/v1_0": ["What is x?", EXPLAIN],
        "textvqa/34602": ["What brand?", READ_TEXT],
        "mme/line1": ["Is it red?", EXPLAIN],
        "mme/line2": ["Is it blue?", EXPLAIN],
        "coco/1": [DESCRIBE],
        "vizwiz/row1": ["What is this?", EXPLAIN],
        "gqa/7": ["Is it red?", EXPLAIN],
        "seed/7": ["Is it red?", EXPLAIN],
    }


def test_vispec_says_what_is_missing_unless_it_is_not_wanted(vispec: Path) -> None:
    (vispec / "gqa" / "llava_gqa_testdev_balanced.jsonl").unlink()
    message = r"lacks gqa/llava_gqa_testdev_balanced.jsonl \(or gqa/questions.jsonl\) with its "
    message += r"images \[GQA: .*images.zip of .*\]. Fetch what is missing, or name the tasks"
    with pytest.raises(ViSpecError, match=message):
        load_dataset("vispec", vispec)
    samples = load_dataset("vispec", vispec, DatasetOptions(families=("mme", "coco"))).samples
    assert [sample.family for sample in samples] == ["coco", "mme", "mme"]
    with pytest.raises(ViSpecError, match="family charts is no task of dataset vispec; it has sqa"):
        load_dataset("vispec", vispec, DatasetOptions(families=("charts",)))


def test_vispec_takes_files_of_ones_own(vispec: Path) -> None:
    picture(vispec / "sqa" / "images" / "own.png")
    own = {"image": "own.png", "question": "Q?", "choices": ["x"], "hint": "H"}
    write(
        vispec / "sqa" / "questions.jsonl",
        own | {"id": "a"},
        own | {"id": "b", "choices": []},
        own | {"id": "c", "image": "gone.png"},
    )
    write(vispec / "coco" / "questions.jsonl", {"image": "val2014/a.png"})
    dataset = load_dataset("vispec", vispec, DatasetOptions(families=("sqa", "coco")))
    samples = by_id(dataset)
    assert samples.keys() == {"sqa/a", "coco/line1"}
    assert samples["sqa/a"].turns[1].text.startswith("Context: H\nQuestion: Q?\nOptions: (A) x\n")
    reasons = {"sqa/b": "no choices", "sqa/c": "image gone.png does not exist"}
    assert rejections(dataset) == reasons
    assert TASKS.keys() == {name.partition("/")[0] for name in PUBLISHED}


@pytest.fixture
def sample(tmp_path: Path) -> BenchSample:
    images = [picture(tmp_path / "in" / f"{color}.png", color) for color in ("red", "blue")]
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

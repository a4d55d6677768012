"""The ViSpec paper's eight tasks in the forms in which they are published."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.bench.dataset_files import by_id, picture, rejections, write_json, write_lines
from vllm_vispec.bench.datasets import (
    DatasetOptions,
    load_dataset,
)
from vllm_vispec.bench.public_sets import CHAT_SYSTEM, DESCRIBE, EXPLAIN, READ_TEXT, TASKS
from vllm_vispec.utils.errors import ViSpecError


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
        "gqa/questions.jsonl) with images in gqa/images [GQA: llava_gqa_testdev_balanced.jsonl of "
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

"""The eight tasks of the ViSpec paper: where their questions are, and how the paper asks them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm_vispec.bench.datasets.records import ID_FIELDS, Json, first_of, read_json, read_lines
from vllm_vispec.utils.errors import ViSpecError

EXPLAIN = "Please answer with an explanation."
READ_TEXT = (
    "Perform an OCR task on the provided image. Please extract the text accurately and provide a "
    "detailed explanation of the process. Ensure the response is comprehensive and well-structured."
)
DESCRIBE = "Please provide a detailed description of the given image."
LETTERS = "ABCDEFGHIJ"
OWN_FILE = "questions.jsonl"


@dataclass(frozen=True)
class Question:
    """One question of a task; ``image`` is a path as its file implies it."""

    question_id: str
    text: str
    image: str
    choices: tuple[str, ...] = ()
    hint: str = ""


@dataclass(frozen=True)
class Form:
    """A file that questions come in.

    Attributes:
        rows: its rows by name.
        question: None for a row of another split or kind; raises ValueError for a damaged one.
        id_fields: fields with a row's id; empty: its place in the file (an object's keys, a line's
            number).
    """

    file: str
    rows: Callable[[Path], Iterable[tuple[str, Any]]]
    question: Callable[[Json, str], Question | None]
    id_fields: tuple[str, ...] = ID_FIELDS


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        ask: the texts that stand before the image, in this order.
        release: the file in which the task's authors (or LLaVA's evaluation) publish it.
        images: folders tried for images, relative to the task's.
        source: public names of questions and images.
    """

    name: str
    ask: Callable[[Question], tuple[str, ...]]
    release: Form
    images: tuple[str, ...]
    source: str

    @property
    def forms(self) -> tuple[Form, ...]:
        """Files in the order in which they are looked for."""
        return (OWN_FORM, self.release)


def explained(question: Question) -> tuple[str, ...]:
    """The question, and a request to explain the answer."""
    return question.text, EXPLAIN


def described(_: Question) -> tuple[str, ...]:
    """A request for a caption."""
    return (DESCRIBE,)


def read_aloud(question: Question) -> tuple[str, ...]:
    """The question, and a request to read the text in the image."""
    return question.text, READ_TEXT


def chosen(question: Question) -> tuple[str, ...]:
    """A multiple-choice question with its options."""
    if not question.choices:
        raise ValueError("no choices")
    options = " ".join(
        f"({letter}) {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)
    )
    return (
        f"Context: {question.hint.strip() or 'N/A'}\nQuestion: {question.text}\n"
        f'Options: {options}\nYour answer should begin with "The answer is". {EXPLAIN} Answer:',
    )


def _list_under(*keys: str) -> Callable[[Path], Iterable[tuple[str, Any]]]:
    """Rows that are a list, below the keys of a JSON file."""

    def rows(path: Path) -> Iterable[tuple[str, Any]]:
        content = read_json(path)
        for key in keys:
            content = content.get(key) if isinstance(content, Mapping) else None
        if not isinstance(content, list):
            raise ViSpecError(f"dataset file {path} holds no list of questions; fetch it again")
        return ((f"row{number}", row) for number, row in enumerate(content, start=1))

    return rows


def _object(path: Path) -> Iterable[tuple[str, Any]]:
    """Rows that are the values of a JSON object."""
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise ViSpecError(f"dataset file {path} holds no object of questions; fetch it again")
    return content.items()


def _needed(row: Json, *names: str) -> str:
    found = first_of(row, names)
    if found is None:
        raise ValueError(f"the record has no {' or '.join(names)}")
    return str(found)


def _own(row: Json, name: str) -> Question:
    choices = row.get("choices") or ()
    return Question(
        question_id=name,
        text=str(first_of(row, ("question", "text")) or ""),
        image=_needed(row, "image"),
        choices=tuple(str(choice) for choice in choices),
        hint=str(row.get("hint") or ""),
    )


def _llava(row: Json, name: str) -> Question:
    # From the second line on LLaVA asks for one word or a letter, which ViSpec's prompt replaces.
    text = _needed(row, "text").partition("\n")[0]
    return Question(name, text, _needed(row, "image"))


def _science(row: Json, name: str) -> Question | None:
    if row.get("split") != "test" or not row.get("image"):
        return None
    image = f"test/{name}/{row['image']}"
    choices = tuple(str(choice) for choice in row.get("choices") or ())
    return Question(name, _needed(row, "question"), image, choices, str(row.get("hint") or ""))


def _mm_vet(row: Json, name: str) -> Question:
    return Question(name, _needed(row, "question"), _needed(row, "imagename"))


def _text_vqa(row: Json, name: str) -> Question:
    image = _needed(row, "image_id") + ".jpg"
    return Question(name, _needed(row, "question"), image)


def _coco(row: Json, name: str) -> Question | None:
    if row.get("split") != "test":
        return None
    image = f"{row.get('filepath', '.')}/{_needed(row, 'filename')}"
    return Question(name, "", image)


def _viz_wiz(row: Json, name: str) -> Question:
    return Question(name, _needed(row, "question"), _needed(row, "image"))


def _seed(row: Json, name: str) -> Question | None:
    # The rest are frames of videos.
    return _llava(row, name) if _needed(row, "image").startswith("SEED-Bench-image") else None


OWN_FORM = Form(OWN_FILE, read_lines, _own)
_TASKS = (
    Task(
        "sqa",
        chosen,
        Form("problems.json", _object, _science, id_fields=()),
        ("images", "."),
        "ScienceQA: problems.json and images/test of github.com/lupantech/ScienceQA",
    ),
    Task(
        "mmvet",
        explained,
        Form("mm-vet.json", _object, _mm_vet, id_fields=()),
        ("images",),
        "MM-Vet: mm-vet.zip of github.com/yuweihao/MM-Vet",
    ),
    Task(
        "textvqa",
        read_aloud,
        Form("TextVQA_0.5.1_val.json", _list_under("data"), _text_vqa),
        ("train_images", "images"),
        "TextVQA 0.5.1 val: questions and train_val_images.zip of textvqa.org",
    ),
    Task(
        "mme",
        explained,
        # The two questions about an image share their question_id.
        Form("llava_mme.jsonl", read_lines, _llava, id_fields=()),
        ("MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark_release_version", "images"),
        "MME: llava_mme.jsonl of LLaVA's eval.zip, images of MME_Benchmark_release_version",
    ),
    Task(
        "coco",
        described,
        Form("dataset_coco.json", _list_under("images"), _coco, id_fields=("cocoid",)),
        ("images", "."),
        "COCO captions, Karpathy's test split: dataset_coco.json of his caption_datasets.zip, "
        "val2014.zip of cocodataset.org",
    ),
    Task(
        "vizwiz",
        explained,
        Form("test.json", _list_under(), _viz_wiz),
        ("test", "images"),
        "VizWiz-VQA test: Annotations.zip and test.zip of vizwiz.org",
    ),
    Task(
        "gqa",
        explained,
        Form("llava_gqa_testdev_balanced.jsonl", read_lines, _llava),
        ("images",),
        "GQA: llava_gqa_testdev_balanced.jsonl of LLaVA's eval.zip, images.zip of "
        "cs.stanford.edu/people/dorarad/gqa",
    ),
    Task(
        "seed",
        explained,
        Form("llava-seed-bench.jsonl", read_lines, _seed),
        (".",),
        "SEED-Bench: llava-seed-bench.jsonl of LLaVA's eval.zip, SEED-Bench-image.zip of "
        "AILab-CVPR/SEED-Bench on the Hugging Face hub",
    ),
)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _TASKS})

"""Readers of published question sets, from files that the user fetched: MMSpec and ViSpec's tasks.

MMSpec (arXiv 2603.14989) has 600 samples in six task categories, multi-turn included. A split is a
folder with `mmspec.jsonl` and `images/`. A record has `id`, `image`, `turns` (the questions, as
strings), `category` (a label inside the task, not used here) and `topic` (the task). These names
are certain. Where published descriptions differ or are silent, this reader takes more: an image
path may start from `images/` or from the split's folder, `image` may be a list or missing (text
only), a question may stand alone under `prompt` or `question`, and a topic may be written with
spaces, hyphens or underscores. A topic outside the six becomes a family of its own. As in MMSpec's
own evaluation, every turn of a dialogue is measured, with the target's own answers to the turns
before it, behind Vicuna's system prompt. The full split of 600 records is therefore 723 samples.

The evaluation of the ViSpec paper (arXiv 2509.15235) has eight tasks. A dataset is a folder with
one folder per task, which holds the file in which the task is published (see `TASKS`) with its
images, or `questions.jsonl` of one's own: `id`, `image` (a path from the task's folder or its
`images/`), `question`, and for multiple choice `choices` and `hint`. The own file goes first. The
wording of the prompts, their order (question, instruction, image) and Vicuna's system prompt are
those of the paper's evaluation scripts and of projects that repeat them. Not certain: the
instruction for VizWiz and SEED-Bench (taken to be the one of the other question sets), the split
of ScienceQA and the examples before its questions (test and none here; the scripts' defaults are
val and three). The paper's 100 questions of a task come from a shuffle inside another library; the
ones that `limit` takes here are others. Compare acceptance and speedup with the paper's, not
single answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm_vispec.data.images import image_file
from vllm_vispec.data.types import Conversation, Part, Rejected, Turn
from vllm_vispec.utils.errors import ViSpecError

UNLABELLED = "unlabelled"
"""Family of a record that names none."""
CHAT_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
"""Vicuna's system prompt, which the evaluations of ViSpec and MMSpec put before every question."""
EXPLAIN = "Please answer with an explanation."
READ_TEXT = (
    "Perform an OCR task on the provided image. Please extract the text accurately and provide a "
    "detailed explanation of the process. Ensure the response is comprehensive and well-structured."
)
DESCRIBE = "Please provide a detailed description of the given image."
MMSPEC_FILE, OWN_FILE = "mmspec.jsonl", "questions.jsonl"
ID_FIELDS = ("id", "question_id", "cocoid")
IMAGE_FOLDERS = (
    "images",
    "test",
    "train_images",
    "MME_Benchmark_release_version/MME_Benchmark",
    "MME_Benchmark_release_version",
    ".",
)
"""Where a task's images may lie in its folder, as its archives are unpacked."""
TOPICS = {
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
"""MMSpec's topics by our task families."""

Json = Mapping[str, Any]


def read_mmspec(path: Path, image_root: Path | None) -> Iterator[Conversation | Rejected]:
    """Yield the records of an MMSpec split: its folder, or its JSONL file.

    Raises:
        ViSpecError: it is neither.
    """
    file = path / MMSPEC_FILE if path.is_dir() else path
    if not file.is_file():
        raise ViSpecError(
            f"dataset mmspec: {file} does not exist; give a split's folder with {MMSPEC_FILE} and "
            "images/, e.g. dataset/MMSpec/testmini of a clone of github.com/killthefullmoon/MMSpec"
        )
    folders = [image_root] if image_root is not None else [file.parent / "images", file.parent]
    return _convert_each(_rows(file), partial(_mmspec_dialogue, folders=folders))


def _mmspec_dialogue(record: Json, sample_id: str, folders: list[Path]) -> Conversation:
    """Return a record as a dialogue without answers, its images in the first question."""
    images = [_find_image(str(one), folders) for one in _as_list(record, "image", "images")]
    questions = _as_list(record, "turns", "prompt", "question")
    if not questions:
        raise ValueError("no question")
    for one in questions:
        if not isinstance(one, str):
            raise ValueError(f"a question is not text but {type(one).__name__}")
    first = Turn("user", (*(Part(image=image) for image in images), Part(text=questions[0])))
    turns = (_text("system", CHAT_SYSTEM), first, *(_text("user", one) for one in questions[1:]))
    name = re.sub(r"[^a-z0-9]+", "_", str(record.get("topic") or "").lower()).strip("_")
    return Conversation(sample_id, turns, TOPICS.get(name, name or UNLABELLED))


@dataclass(frozen=True)
class Task:
    """One task of the ViSpec paper.

    Attributes:
        file: in which the task's authors (or LLaVA's evaluation) publish it: JSON lines, or JSON
            with the rows in a list or an object.
        source: public names of questions and images.
        prompt: behind the question.
        asks: whether there is a question; else only the prompt is asked.
        image: the record's path, as a pattern of its fields and ``name``.
        keep: fields that a record needs, with how they begin; others are of another split or kind.
        ids: whether records have ids; else their place in the file counts.
    """

    file: str
    source: str
    prompt: str = EXPLAIN
    asks: bool = True
    image: str = "{image}"
    keep: Mapping[str, str] = field(default_factory=dict)
    ids: bool = True


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "sqa": Task(
            "problems.json",
            "ScienceQA: problems.json and images/test of github.com/lupantech/ScienceQA",
            image="test/{name}/{image}",
            keep={"split": "test", "image": ""},
        ),
        "mmvet": Task(
            "mm-vet.json",
            "MM-Vet: mm-vet.zip of github.com/yuweihao/MM-Vet",
            image="{imagename}",
        ),
        "textvqa": Task(
            "TextVQA_0.5.1_val.json",
            "TextVQA 0.5.1 val: questions and train_val_images.zip of textvqa.org",
            prompt=READ_TEXT,
            image="{image_id}.jpg",
        ),
        "mme": Task(
            "llava_mme.jsonl",
            "MME: llava_mme.jsonl of LLaVA's eval.zip, images of MME_Benchmark_release_version",
            # The two questions about an image share their question_id.
            ids=False,
        ),
        "coco": Task(
            "dataset_coco.json",
            "COCO captions, Karpathy's test split: dataset_coco.json of his caption_datasets.zip, "
            "val2014.zip of cocodataset.org",
            prompt=DESCRIBE,
            asks=False,
            image="{filepath}/{filename}",
            keep={"split": "test"},
        ),
        "vizwiz": Task("test.json", "VizWiz-VQA test: Annotations.zip and test.zip of vizwiz.org"),
        "gqa": Task(
            "llava_gqa_testdev_balanced.jsonl",
            "GQA: llava_gqa_testdev_balanced.jsonl of LLaVA's eval.zip, images.zip of "
            "cs.stanford.edu/people/dorarad/gqa",
        ),
        "seed": Task(
            "llava-seed-bench.jsonl",
            "SEED-Bench: llava-seed-bench.jsonl of LLaVA's eval.zip, SEED-Bench-image.zip of "
            "AILab-CVPR/SEED-Bench on the Hugging Face hub",
            # The rest are frames of videos.
            keep={"image": "SEED-Bench-image"},
        ),
    }
)


def read_vispec(
    path: Path, families: Sequence[str], image_root: Path | None
) -> Iterator[Conversation | Rejected]:
    """Yield the questions of the wanted tasks of the ViSpec paper, of all eight if none is named.

    Raises:
        ViSpecError: there is no such task, or files of a task are missing; the message says which,
            and where they are to be had.
    """
    unknown = next((name for name in families if name not in TASKS), None)
    if unknown is not None:
        raise ViSpecError(
            f"family {unknown} is no task of dataset vispec; it has {', '.join(TASKS)}"
        )
    wanted = {name: TASKS[name] for name in families or TASKS}
    missing = [
        f"{name}/{task.file} (or {name}/{OWN_FILE}) with its images [{task.source}]"
        for name, task in wanted.items()
        if not any((path / name / file).is_file() for file in (OWN_FILE, task.file))
    ]
    if missing:
        raise ViSpecError(
            f"dataset vispec: {path} lacks {'; '.join(missing)}. Fetch what is missing, or name "
            "the tasks that are there as families"
        )
    return (x for name, task in wanted.items() for x in _read_task(path, name, task, image_root))


def _read_task(
    path: Path, name: str, task: Task, root: Path | None
) -> Iterator[Conversation | Rejected]:
    folders = [path / name / one for one in IMAGE_FOLDERS] if root is None else [root / name, root]
    own = path / name / OWN_FILE
    if own.is_file():
        task = Task(OWN_FILE, task.source, task.prompt, task.asks)
    convert = partial(_task_dialogue, task=task, family=name, folders=folders)
    return _convert_each(_rows(path / name / task.file), convert, f"{name}/", task.ids)


def _task_dialogue(
    record: Json, name: str, task: Task, family: str, folders: list[Path]
) -> Conversation | None:
    for needed, beginning in task.keep.items():
        value = str(record.get(needed) or "")
        if not value or not value.startswith(beginning):
            return None
    texts = [task.prompt]
    if task.asks:
        # LLaVA's files have "text", whose later lines ask for one word or a letter.
        question = str(record.get("question") or str(record.get("text") or "").partition("\n")[0])
        if not question.strip():
            raise ValueError("the record has no question")
        texts = [question, *texts] if family != "sqa" else [_multiple_choice(record, question)]
    try:
        given = {field: value for field, value in record.items() if value not in (None, "")}
        image = task.image.format_map({"filepath": ".", **given, "name": name})
    except KeyError as error:
        raise ValueError(f"the record has no {error.args[0]}") from error
    parts = (*(Part(text=text) for text in texts), Part(image=_find_image(image, folders)))
    turns = (_text("system", CHAT_SYSTEM), Turn("user", parts))
    return Conversation(f"{family}/{name}", turns, family)


def _multiple_choice(record: Json, question: str) -> str:
    choices = record.get("choices") or ()
    if not choices:
        raise ValueError("no choices")
    options = " ".join(
        f"({letter}) {one}" for letter, one in zip("ABCDEFGHIJ", choices, strict=False)
    )
    hint = str(record.get("hint") or "").strip() or "N/A"
    return (
        f"Context: {hint}\nQuestion: {question}\nOptions: {options}\n"
        f'Your answer should begin with "The answer is". {EXPLAIN} Answer:'
    )


def _rows(path: Path) -> Iterable[tuple[str, Any]]:
    """Return (name, undecoded line) of a JSONL file, or (name, record) of a JSON file.

    Raises:
        ViSpecError: the file cannot be read or holds no records.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".jsonl":
            lines = enumerate(content.splitlines(), start=1)
            return [(f"line{number}", line) for number, line in lines if line.strip()]
        rows = json.loads(content.decode("utf-8-sig"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ViSpecError(f"dataset file {path} cannot be read: {reason}") from error
    except ValueError as error:
        raise ViSpecError(f"dataset file {path} cannot be read: not JSON") from error
    if isinstance(rows, Mapping):
        lists = [rows[key] for key in ("data", "images") if isinstance(rows.get(key), list)]
        if not lists:
            return rows.items()
        rows = lists[0]
    if not isinstance(rows, list):
        raise ViSpecError(f"dataset file {path} holds no list of questions; fetch it again")
    return [(f"row{number}", row) for number, row in enumerate(rows, start=1)]


def _convert_each(
    rows: Iterable[tuple[str, Any]],
    convert: Callable[[Json, str], Conversation | None],
    prefix: str = "",
    ids: bool = True,
) -> Iterator[Conversation | Rejected]:
    """Yield the conversation of every record, or why it is left out.

    Args:
        convert: gets a record and its id. It raises ValueError with the reason if the record
            cannot be used, and returns None if it is no part of the dataset (another split, say).
        prefix: of the ids of records that are left out.
        ids: whether records have ids; without one its name serves.
    """
    seen: set[str] = set()
    for name, row in rows:
        sample_id = name
        try:
            record = json.loads(row.decode("utf-8-sig")) if isinstance(row, bytes) else row
            if not isinstance(record, Mapping):
                raise ValueError("not a JSON object")
            sample_id = str((ids and _first_of(record, ID_FIELDS)) or name)
            if sample_id in seen:
                sample_id = f"{sample_id} ({name})"
                raise ValueError("a record with this id was there before")
            item = convert(record, sample_id)
            if item is not None:
                seen.add(sample_id)
                yield item
        except (json.JSONDecodeError, UnicodeDecodeError):
            yield Rejected(prefix + name, "not JSON")
        except ValueError as error:
            seen.add(sample_id)
            yield Rejected(prefix + sample_id, str(error))


def _first_of(record: Json, names: Sequence[str]) -> Any:
    """Return the first field that is there and not empty, None without one."""
    return next((record[name] for name in names if record.get(name) not in (None, "", [])), None)


def _as_list(record: Json, *names: str) -> list[Any]:
    found = _first_of(record, names)
    return found if isinstance(found, list) else [] if found is None else [found]


def _find_image(path: str, folders: Sequence[Path]) -> str:
    """Return the absolute path of an image that lies in one of the folders.

    Raises:
        BadImage: it lies in none.
    """
    found = next((folder / path for folder in folders if (folder / path).is_file()), None)
    return str((found or image_file(path, folders[0])).resolve())


def _text(role: str, text: str) -> Turn:
    return Turn(role, (Part(text=text),))

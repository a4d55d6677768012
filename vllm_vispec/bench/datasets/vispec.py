"""The eight evaluation tasks of the ViSpec paper (arXiv 2509.15235), from files the user fetched.

A dataset is a folder with one folder per task: `sqa`, `mmvet`, `textvqa`, `mme`, `coco`, `vizwiz`,
`gqa`, `seed`. Each holds the file in which the task is published (see `vispec_tasks.TASKS`) with
its images, or `questions.jsonl` of one's own: `id`, `image` (a path from the task's folder or its
`images/`), `question`, and for multiple choice `choices` and `hint`. The own file goes first.

The wording of the prompts, their order (question, instruction, image), Vicuna's system prompt and
the limit of 1024 tokens are those of the paper's evaluation scripts and of projects that repeat
them. Not certain: the instruction for VizWiz and SEED-Bench (taken to be the one of the other
question sets), the split of ScienceQA and the examples before its questions (test and none here;
the scripts' defaults are val and three). The paper's 100 questions of a task come from a shuffle
inside another library; the ones that `limit` takes here are others. Compare acceptance and
speedup with the paper's, not single answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from vllm_vispec.bench.datasets.records import (
    CHAT_SYSTEM,
    Json,
    convert_each,
    find_image,
    text_turn,
)
from vllm_vispec.bench.datasets.types import Adapter, DatasetOptions
from vllm_vispec.bench.datasets.vispec_tasks import OWN_FILE, TASKS, Form, Task
from vllm_vispec.data.types import Conversation, Part, Rejected, Turn
from vllm_vispec.utils.errors import ViSpecError


def read(path: Path, options: DatasetOptions) -> Iterator[Conversation | Rejected]:
    """Yield the questions of the wanted tasks, all eight if `families` is empty.

    Raises:
        ViSpecError: there is no such task, or files of a task are missing; the message says which,
            and where they are to be had.
    """
    wanted = [_task(name) for name in options.families or TASKS]
    missing = [task for task in wanted if _form(path / task.name, task) is None]
    if missing:
        raise ViSpecError(
            f"dataset vispec: {path} lacks {'; '.join(_needs(task) for task in missing)}. Fetch "
            "what is missing, or name the tasks that are there as families"
        )
    return (item for task in wanted for item in _read_task(path / task.name, task, options))


def _task(name: str) -> Task:
    if name not in TASKS:
        raise ViSpecError(f"family {name} is no task of dataset vispec; it has {', '.join(TASKS)}")
    return TASKS[name]


def _needs(task: Task) -> str:
    return (
        f"{task.name}/{task.release.file} (or {task.name}/{OWN_FILE}) with images in "
        f"{task.name}/{task.images[0]} [{task.source}]"
    )


def _form(folder: Path, task: Task) -> Form | None:
    return next((form for form in task.forms if (folder / form.file).is_file()), None)


def _read_task(
    folder: Path, task: Task, options: DatasetOptions
) -> Iterator[Conversation | Rejected]:
    form = _form(folder, task)
    assert form is not None
    root = options.image_root
    folders = [folder / name for name in task.images] if root is None else [root / task.name, root]
    if form.file == OWN_FILE:
        folders += [folder / "images", folder]
    convert = partial(_to_conversation, task=task, form=form, folders=folders)
    for item in convert_each(form.rows(folder / form.file), convert, form.id_fields):
        rejected = isinstance(item, Rejected)
        yield replace(item, sample_id=f"{task.name}/{item.sample_id}") if rejected else item


def _to_conversation(
    record: Json, name: str, task: Task, form: Form, folders: list[Path]
) -> Conversation | None:
    question = form.question(record, name)
    if question is None:
        return None
    texts = task.ask(question)
    if not all(text.strip() for text in texts):
        raise ValueError("an empty question")
    image = find_image(question.image, folders)
    parts = (*(Part(text=text) for text in texts), Part(image=image))
    turns = (text_turn("system", CHAT_SYSTEM), Turn("user", parts))
    return Conversation(f"{task.name}/{question.question_id}", turns, task.name)


ADAPTER = Adapter(
    name="vispec",
    summary="the ViSpec paper's eight tasks, a folder each",
    read=read,
    max_tokens=1024,
)

"""Answer a JSONL file of questions: `python -m examples.batch_job IN.jsonl OUT.jsonl`.

A line of the input is ``{"id": ..., "image": "file.png" or null, "question": ...}``; image paths
are relative to the input file. A line of the output is ``{"id": ..., "answer": ...}``. Started
again, the job goes on after the answers that are already there. If the input file does not exist,
one about a few held-out images is written first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from examples.pair import DraftOption, DraftTokensOption, ModelOption, Pair, start_llm
from examples.pictures import held_out_pictures, load_picture
from examples.tiny_vlm.shipped import DRAFT_TOKENS, HEAD, TARGET

Task = dict[str, Any]


def read_tasks(source: Path) -> list[Task]:
    """Return the tasks of a JSONL file."""
    lines = source.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def drop_half_line(target: Path) -> None:
    """Remove a last line that an interrupted run did not finish."""
    if target.exists():
        data = target.read_bytes()
        target.write_bytes(data[: data.rfind(b"\n") + 1])


def answered_ids(target: Path) -> set[str]:
    """Return the ids that have an answer already."""
    if not target.exists():
        return set()
    return {json.loads(line)["id"] for line in target.read_text(encoding="utf-8").splitlines()}


def messages_of(task: Task, folder: Path) -> list[dict[str, Any]]:
    """Return the chat of a task."""
    content: list[dict[str, Any]] = [{"type": "text", "text": task["question"]}]
    if task.get("image"):
        content.insert(0, {"type": "image_pil", "image_pil": load_picture(folder / task["image"])})
    return [{"role": "user", "content": content}]


def write_sample_tasks(source: Path, count: int = 6) -> None:
    """Write an input file about held-out images."""
    source.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, picture in enumerate(held_out_pictures("captioning", count)):
        name = f"{source.stem}-{index}.png"
        picture.save(source.parent / name)
        task = {"id": f"scene-{index}", "image": name, "question": "Describe the picture."}
        lines.append(json.dumps(task))
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(
    source: Annotated[Path, typer.Argument(help="Input JSONL.")] = Path("out/tasks.jsonl"),
    target: Annotated[Path, typer.Argument(help="Output JSONL.")] = Path("out/answers.jsonl"),
    model: ModelOption = TARGET,
    draft_model: DraftOption = HEAD,
    num_speculative_tokens: DraftTokensOption = DRAFT_TOKENS,
    batch_size: Annotated[int, typer.Option(min=1, help="Tasks between two writes.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Answer all tasks that have no answer yet."""
    pair = Pair(model, draft_model, num_speculative_tokens)
    if not source.exists():
        write_sample_tasks(source)
    drop_half_line(target)
    done = answered_ids(target)
    tasks = [task for task in read_tasks(source) if task["id"] not in done]
    print(f"{len(done)} tasks done, {len(tasks)} to do")
    if not tasks:
        return
    llm = start_llm(pair)
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", encoding="utf-8") as sink:
        for start in range(0, len(tasks), batch_size):
            part = tasks[start : start + batch_size]
            outputs = llm.chat([messages_of(task, source.parent) for task in part], params)
            for task, output in zip(part, outputs, strict=True):
                record = {"id": task["id"], "answer": output.outputs[0].text}
                sink.write(json.dumps(record) + "\n")
            sink.flush()


if __name__ == "__main__":
    typer.run(main)

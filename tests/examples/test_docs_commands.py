"""The commands of README.md and docs/training.md, run as printed on the tiny pair.

Only paths and sizes are others: the target's name stands for the tiny target, and a `vispec` that
comes first on the path adds limits to each command.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.tiny_vlm.dataset import make_sample
from examples.tiny_vlm.shipped import TARGET
from tests.support.child import REPOSITORY
from tests.support.engine import IN_PROCESS_ENV

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

# What makes a command small, by its first word.
ENGINE = "--max-model-len 1024 --engine '{\"enforce_eager\": true}' --max-tokens 24"
TRAIN = "--set schedule.max_steps=2 --set run.device=cpu --set data.workers=0"
VISPEC = f"""#!/bin/sh
command=$1; shift
case $command in
regenerate) set -- "$@" {ENGINE} ;;
train) set -- "$@" {TRAIN} ;;
eval) set -- "$@" --device cpu ;;
esac
exec {sys.executable} -m vllm_vispec "$command" "$@"
"""
# Serving is tested elsewhere; here it is enough that the folder is a head that names its target.
VLLM = f"""#!/bin/sh
{sys.executable} -m vllm_vispec doctor --head "$2" | grep -q "serve with.*target: "
"""
ONE_DEVICE = "{enforce_eager: true, max_model_len: 1024, gpu_memory_utilization: 0.2}"
LEFT_OUT = ("pip ", "vispec bench ")


def commands(page: str) -> list[str]:
    """Return the lines of the page's shell blocks from the first `vispec regenerate` on."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [
        line.partition("   #")[0].strip()
        for block in blocks
        if "vispec regenerate" in block or "vispec train" in block
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [line for line in lines if line and not line.startswith(LEFT_OUT)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: images, questions, ShareGPT's dialogues."""
    folder = tmp_path_factory.mktemp("user")
    for name, first, count in (("images", 0, 8), ("held_out", 700_000, 3)):
        (folder / name).mkdir()
        for index in range(first, first + count):
            canvas = make_sample("heldout", index, "captioning").canvas
            assert canvas is not None
            canvas.image.save(folder / name / f"{index}.png")
    record = {"image": "0.png", "conversations": [{"from": "human", "value": "<image>\nDescribe."}]}
    (folder / "questions.jsonl").write_text(json.dumps({"id": "0", **record}))
    record["image"] = "held_out/700000.png"
    (folder / "held_out_questions.jsonl").write_text(json.dumps({"id": "1", **record}))
    talk = [
        {
            "id": f"chat{index}",
            "conversations": [
                {
                    "from": "human",
                    "value": make_sample("heldout", index, "text_chat").dialogue.turns[0].question,
                },
                {"from": "gpt", "value": "An old answer."},
            ],
        }
        for index in range(4)
    ]
    (folder / "sharegpt.json").write_text(json.dumps(talk))
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("vispec", VISPEC), ("vllm", VLLM)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("page", ["docs/training.md", "README.md"])
def test_the_commands_work_as_printed(folder: Path, page: str) -> None:
    environment = (
        os.environ
        | IN_PROCESS_ENV
        | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
        }
    )
    found = commands(page)
    assert len(found) >= 5
    for line in found:
        command = re.sub(
            r"Qwen/Qwen2.5-VL-\d+B-Instruct|\bTARGET\b", str(REPOSITORY / TARGET), line
        )
        command = command.replace("{tensor_parallel_size: 8}", ONE_DEVICE)
        if line.startswith("vispec train") and "target.model" not in line:
            command += f" --set target.model={REPOSITORY / TARGET}"
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
        if "--dry-run" in line:
            assert "hours in all" in done.stdout

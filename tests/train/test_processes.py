"""Several processes: torchrun and Ray Train give what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.child import REPOSITORY
from tests.support.tiny_store import TinyStore
from tests.train.language_models import write_language_model
from tests.train.runs import losses, recipe, run
from vllm_vispec.train.checkpoint import Checkpoints
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.ray_train import _use_gpu
from vllm_vispec.utils.errors import ViSpecError

STEPS = 4


def settings(target: Path, data: Path, output: Path, passes: int, **head: str) -> TrainConfig:
    """A recipe with so many forward passes per step and process.

    Gradients that are nothing but rounding do not move weights.
    """
    return recipe(target, data, output, schedule__max_steps=STEPS, optimizer__lr=1e-4,
                  optimizer__eps=1e-4,
                  batch__size=1, batch__accumulate=passes, optimizer__clip="norm",
                  optimizer__ema=0.9, schedule__decay="constant", run__validate_every=2,
                  **head)  # fmt: skip


def arguments(config: TrainConfig) -> list[str]:
    """The command line's way to say the same."""
    pairs = [(name, value) for name, value in config.flat().items() if value not in ("", [], {})]
    texts = [f"{name}={json.dumps(value)}" for name, value in pairs]
    return [word for text in texts for word in ("--set", text)]


def call(command: list[str]) -> str:
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def check_equal(one: Path, two: Path) -> None:
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert list(losses(two)) == list(range(1, STEPS + 1))
    first, second = (Checkpoints(d / "checkpoints", 2).load(STEPS).groups for d in (one, two))
    for group in ("weights", "average"):
        for name, tensor in first[group].items():
            assert float((second[group][name] - tensor).abs().max()) < 1e-5, name
    curves = [json.loads((folder / "curve.json").read_text()) for folder in (one, two)]
    assert [p["acceptance_length"] for p in curves[0]] == [
        p["acceptance_length"] for p in curves[1]
    ]


# Every part that a head can have, and both sources of noise.
HEAD = {
    "head__kind": "specvlm_global",
    "head__compressor": "select(prune:2,conv:2)",
    "loss__noise": "0.1",
    "loss__chunk_rows": "16",
}
# The first stage of a draft VLM: most of it is frozen.
DRAFT_VLM = {"head__kind": "draft_vlm", "head__trained": "projector"}
# A model that may be large, and batches by tokens.
PUBLISHED = {
    "head__kind": "draft_vlm",
    "head__trained": "language_model",
    "run__shard": "on",
    "batch__max_tokens": "120",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "head", [HEAD, DRAFT_VLM, PUBLISHED], ids=["head", "draft VLM", "published model"]
)
def test_two_processes_equal_one(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, head: dict[str, str]
) -> None:
    target = tiny.target("qwen2_5_vl")
    if head is DRAFT_VLM:
        write_language_model(tmp_path / "lm", vocab_size=1024)
        head = {**head, "head__init_from": str(tmp_path / "lm")}
    elif head is PUBLISHED:
        head = {**head, "head__init_from": tiny.sibling("qwen2_5_vl")}
    run(settings(target, dialogues, tmp_path / "one", 8, **head))
    two = settings(target, dialogues, tmp_path / "two", 4, **head)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launcher, "-m", "vllm_vispec", "train", *arguments(two)]
    # In two goes: moments and averages come back from the checkpoint.
    call([*command, "--set", "schedule.max_steps=2"])
    assert Checkpoints(tmp_path / "two" / "checkpoints", 2).steps() == [2]
    text = call([*command, "--override", "schedule.max_steps"])
    # Only the main process speaks.
    assert text.count("finished after 4 steps") == 1
    check_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_dry_run_takes_steps_on_two_processes(
    tiny: TinyStore, dialogues: Path, tmp_path: Path
) -> None:
    config = settings(tiny.target("qwen2_5_vl"), dialogues, tmp_path / "run", 1)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launcher, "-m", "vllm_vispec", "train", "--dry-run", "--time"]
    text = call([*command, *arguments(config)])
    assert text.count("20 steps timed") == 1
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("gpus", "device", "found"), [(2, "auto", True), (0, "auto", False), (2, "cpu", False)]
)
def test_ray_workers_get_gpus_where_there_are_any(gpus: int, device: str, found: bool) -> None:
    assert _use_gpu({"CPU": 4, "GPU": gpus}, device, 2) == found


def test_ray_does_not_fall_back_to_cpus(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ViSpecError, match=r"has 1: .*run\.device=cpu"):
        _use_gpu({"CPU": 4, "GPU": 1}, "auto", 2)
    _use_gpu({"CPU": 4}, "auto", 2)
    assert "no GPU: its workers train on CPUs" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ray_workers_equal_one(tiny: TinyStore, dialogues: Path, tmp_path: Path) -> None:
    target = tiny.target("qwen2_5_vl")
    run(settings(target, dialogues, tmp_path / "one", 8))
    two = settings(target, dialogues, tmp_path / "two", 4)
    text = call(["-m", "vllm_vispec", "train", "--ray", "--workers", "2", *arguments(two)])
    assert "finished after 4 steps" in text
    check_equal(tmp_path / "one", tmp_path / "two")
    command = json.loads((tmp_path / "two" / "run.json").read_text())["command"]
    assert "--ray --workers 2" in command

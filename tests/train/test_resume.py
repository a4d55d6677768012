"""A run that is killed, stopped or changed: it goes on as if nothing had happened, or refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.child import ChildError, run_in_subprocess
from tests.support.tiny_store import TinyStore
from tests.train.dialogues import recipe
from tests.train.jobs import losses, run_and_signal
from vllm_vispec.train.checkpoint import Checkpoints, check_same_settings
from vllm_vispec.train.config import TrainConfig, config_from_flat
from vllm_vispec.train.distributed import processes
from vllm_vispec.train.loop import Outcome, train
from vllm_vispec.utils.errors import ViSpecError

ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # sums depend on the number of threads


def run(config: TrainConfig, *override: str) -> Outcome:
    with processes("cpu") as group:
        return train(config, group, override)


def twelve_steps(target: Path, data: Path, output: Path) -> TrainConfig:
    """12 steps over two and a half epochs with everything that has a state."""
    return recipe(target, data, output, schedule__max_steps=12, run__save_every=6,
                  optimizer__ema=0.9, loss__noise=0.2, run__validate_every=4,
                  run__threads=1, teacher__mode="offline",
                  teacher__cache_dir=str(output.parent / "cache"))  # fmt: skip


def test_killed_and_resumed_equals_uninterrupted(
    tiny: TinyStore, dialogues: Path, tmp_path: Path
) -> None:
    target = tiny.target("qwen2_5_vl")
    run(twelve_steps(target, dialogues, tmp_path / "whole"))
    config = twelve_steps(target, dialogues, tmp_path / "killed")
    job = {"flat": config.flat(), "at_step": 8, "signal_name": "SIGKILL"}
    with pytest.raises(ChildError, match="exit status -9"):
        run_in_subprocess("tests.train.jobs:run_and_signal", job, ENVIRONMENT)
    saved = Checkpoints(tmp_path / "killed" / "checkpoints", 2)
    assert saved.steps()[-1] == 6
    assert list(losses(tmp_path / "killed")) == [1, 2, 3, 4, 5, 6, 7]
    assert run(config).step == 12
    whole, killed = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert list(killed) == list(range(1, 13))
    assert killed == pytest.approx(whole, abs=1e-6, rel=1e-6)
    for name in ("curve.json",):
        curves = [json.loads((tmp_path / d / name).read_text()) for d in ("whole", "killed")]
        rates = [[point["tokens_per_round"] for point in curve] for curve in curves]
        assert rates[0] == rates[1]
    groups = [
        Checkpoints(tmp_path / d / "checkpoints", 2).load(12).groups for d in ("whole", "killed")
    ]
    for group, members in groups[0].items():
        for name, tensor in members.items():
            torch.testing.assert_close(groups[1][group][name], tensor, atol=1e-6, rtol=1e-5)
    resumed = json.loads((tmp_path / "killed" / "run.json").read_text())["resumed"]
    assert [entry["step"] for entry in resumed] == [6]


def test_sigterm_ends_after_the_step(tiny: TinyStore, dialogues: Path, tmp_path: Path) -> None:
    config = twelve_steps(tiny.target("qwen2_5_vl"), dialogues, tmp_path / "run")
    found = run_and_signal(config.flat(), 3, "SIGTERM")
    assert (found["finished"], found["step"]) == (False, 3)
    assert found["message"].startswith("stopped by SIGTERM after step 3; saved in ")
    assert found["message"].endswith("run the same command to go on")
    assert Checkpoints(tmp_path / "run" / "checkpoints", 2).steps()[-1] == 3
    assert not (tmp_path / "run" / "head").exists()


def test_other_settings_are_refused(tiny: TinyStore, dialogues: Path, tmp_path: Path) -> None:
    target = tiny.target("qwen2_5_vl")
    config = recipe(target, dialogues, tmp_path / "run", schedule__max_steps=2, run__save_every=1)
    run(config)
    longer = config_from_flat(config.flat() | {"schedule.max_steps": 3})
    with pytest.raises(ViSpecError, match=r"schedule\.max_steps: 2 -> 3.*--override schedule"):
        run(longer)
    assert run(longer, "schedule.max_steps").step == 3
    resumed = json.loads((tmp_path / "run" / "run.json").read_text())["resumed"]
    assert resumed[0]["overridden"] == ["schedule.max_steps"]
    # Finished: nothing is trained again, the head is written anew.
    assert run(longer).finished


def test_a_head_of_another_shape_is_refused(
    tiny: TinyStore, dialogues: Path, tmp_path: Path
) -> None:
    target = tiny.target("qwen2_5_vl")
    config = recipe(target, dialogues, tmp_path / "run", schedule__max_steps=1)
    run(config)
    other = config_from_flat(config.flat() | {"head.num_query_tokens": 4})
    with pytest.raises(ViSpecError, match="head of another shape"):
        run(other, "head.num_query_tokens")


def test_a_diverging_run_says_so(tiny: TinyStore, dialogues: Path, tmp_path: Path) -> None:
    config = recipe(tiny.target("qwen2_5_vl"), dialogues, tmp_path / "run", optimizer__lr=1e30,
                    optimizer__clip="none", schedule__warmup=0.0)  # fmt: skip
    with pytest.raises(ViSpecError, match=r"loss of step \d is .*lower optimizer\.lr"):
        run(config)


def test_settings_that_an_older_checkpoint_does_not_know_count_as_defaults() -> None:
    now = TrainConfig().flat()
    saved = {name: value for name, value in now.items() if name != "loss.balance"}
    assert check_same_settings(saved, now) == []
    with pytest.raises(ViSpecError, match=r"loss\.balance: 0\.01 -> 0\.5"):
        check_same_settings(saved, now | {"loss.balance": 0.5})

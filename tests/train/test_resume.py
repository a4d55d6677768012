"""A run that is killed, stopped or changed: it goes on as if nothing had happened, or refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.child import ChildError, run_in_subprocess
from tests.support.tiny_store import TinyStore
from tests.train.language_models import write_language_model
from tests.train.runs import lines, losses, recipe, run, run_and_signal
from vllm_vispec.train.checkpoint import Checkpoints, check_same_settings
from vllm_vispec.train.config import TrainConfig, config_from_flat
from vllm_vispec.train.losses import Sums
from vllm_vispec.train.trainer import Trainer
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import lock

LONGER = ("schedule.max_steps",)

HEADS: dict[str, dict[str, Any]] = {
    "vispec": {},
    "gate": {
        "head__kind": "specvlm",
        "head__compressor": "select(prune:3,conv:2,resampler:2,text_only)",
        "optimizer__clip": "norm",
    },
    "draft VLM": {"head__kind": "draft_vlm"},
    "projector": {"head__kind": "draft_vlm", "head__trained": "projector"},
}


def twelve_steps(target: Path, data: Path, output: Path, head: str = "vispec") -> TrainConfig:
    """12 steps over two and a half epochs with everything that has a state."""
    changes = {"loss__noise": 0.2} | HEADS[head]
    if head in ("draft VLM", "projector"):
        folder = output.parent / "lm"
        if not folder.exists():
            write_language_model(folder, vocab_size=1024)
        changes |= {"head__init_from": str(folder), "loss__noise": 0.0}
    return recipe(target, data, output, schedule__max_steps=12, run__save_every=6,
                  optimizer__ema=0.9, run__validate_every=4, run__threads=1,
                  teacher__mode="offline", teacher__cache_dir=str(output.parent / "cache"),
                  **changes)  # fmt: skip


@pytest.mark.parametrize(
    ("head", "signal"),
    [("vispec", "SIGKILL"), *((name, "SIGTERM") for name in HEADS if name != "vispec")],
)
def test_resumed_equals_uninterrupted(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, head: str, signal: str
) -> None:
    target = tiny.target("qwen2_5_vl")
    run(twelve_steps(target, dialogues, tmp_path / "whole", head))
    config = twelve_steps(target, dialogues, tmp_path / "cut", head)
    job: dict[str, Any] = {"flat": config.flat(), "at_step": 8, "signal_name": signal}
    if signal == "SIGKILL":
        with pytest.raises(ChildError, match="exit status -9"):
            run_in_subprocess("tests.train.runs:run_and_signal", job, {"OMP_NUM_THREADS": "1"})
        assert list(losses(tmp_path / "cut")) == [1, 2, 3, 4, 5, 6, 7]
    else:
        found = run_and_signal(**job)
        assert (found["finished"], found["step"]) == (False, 8)
        assert found["message"].startswith("stopped by SIGTERM after step 8; saved in ")
        assert found["message"].endswith("run the same command to go on")
        assert not (tmp_path / "cut" / "head").exists()
    saved = 6 if signal == "SIGKILL" else 8
    assert Checkpoints(tmp_path / "cut" / "checkpoints", 2).steps()[-1] == saved
    assert run(config).step == 12
    whole, cut = (losses(tmp_path / name) for name in ("whole", "cut"))
    assert list(cut) == list(range(1, 13))
    assert cut == pytest.approx(whole, abs=1e-6, rel=1e-6)
    decisions, curves, groups = [], [], []
    for folder in (tmp_path / "whole", tmp_path / "cut"):
        decisions.append([line["gate"]["chosen"] for line in lines(folder) if "gate" in line])
        curve = json.loads((folder / "curve.json").read_text())
        curves.append([point["acceptance_length"] for point in curve])
        groups.append(Checkpoints(folder / "checkpoints", 2).load(12).groups)
    assert decisions[0] == decisions[1]
    assert bool(decisions[0]) == (head == "gate")
    assert curves[0] == curves[1]
    for group, members in groups[0].items():
        for name, tensor in members.items():
            torch.testing.assert_close(groups[1][group][name], tensor, atol=1e-6, rtol=1e-5)
    resumed = json.loads((tmp_path / "cut" / "run.json").read_text())["resumed"]
    assert [entry["step"] for entry in resumed] == [saved]


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
    other = config_from_flat(longer.flat() | {"head.num_query_tokens": 4})
    with pytest.raises(ViSpecError, match="head of another shape"):
        run(other, "head.num_query_tokens")


def test_a_folder_has_one_run_at_a_time(tiny: TinyStore, dialogues: Path, tmp_path: Path) -> None:
    config = recipe(tiny.target("qwen2_5_vl"), dialogues, tmp_path, schedule__max_steps=1)
    with (tmp_path / "run.lock").open("ab") as other:
        lock(other, "no other")
        with pytest.raises(ViSpecError, match=r"run\.output=.* is in use by another run: choose"):
            run(config)
    assert run(config).finished


def test_a_diverging_run_says_so(tiny: TinyStore, dialogues: Path, tmp_path: Path) -> None:
    config = recipe(tiny.target("qwen2_5_vl"), dialogues, tmp_path / "run", optimizer__lr=1e30,
                    optimizer__clip="none", schedule__warmup=0.0)  # fmt: skip
    with pytest.raises(ViSpecError, match=r"loss of step \d is .* 3 steps .*lower optimizer\.lr"):
        run(config)


def test_a_step_that_is_not_finite_is_skipped(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, steps = Trainer._forward, []

    def broken(self: Trainer, batch: Any, number: int, *more: Any) -> Sums:
        steps.append(number)
        found = forward(self, batch, number, *more)
        return replace(found, loss=found.loss * (math.inf if number == 1 else 1))

    target = tiny.target("qwen2_5_vl")
    config = recipe(target, dialogues, tmp_path / "run", schedule__max_steps=3, run__save_every=1)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_forward", broken)
        assert run(config).step == 3
    saved = Checkpoints(tmp_path / "run" / "checkpoints", 2)
    assert (saved.load(2).progress.skipped, saved.load(3).progress.skipped) == (1, 1)
    # A run that goes on knows of it, too.
    assert run(config_from_flat(config.flat() | {"schedule.max_steps": 4}), *LONGER).finished
    assert saved.load(4).progress.skipped == 1


def test_which_settings_may_differ() -> None:
    saved = {"optimizer.lr": 1e-3, "run.keep": 2, "batch.size": 8}
    assert check_same_settings(saved, {**saved, "run.keep": 3}) == []
    now = {**saved, "optimizer.lr": 2e-3, "batch.size": 4}
    message = r"batch\.size: 8 -> 4, optimizer\.lr.*--override batch\.size,optimizer\.lr"
    with pytest.raises(ViSpecError, match=message):
        check_same_settings(saved, now)
    with pytest.raises(ViSpecError, match=r"\(batch\.size: 8 -> 4\)"):
        check_same_settings(saved, now, ("optimizer.lr",))
    assert check_same_settings(saved, now, tuple(now)) == ["batch.size", "optimizer.lr"]
    # Settings that an older checkpoint does not know count as defaults.
    now = TrainConfig().flat()
    saved = {name: value for name, value in now.items() if name != "loss.balance"}
    assert check_same_settings(saved, now) == []
    with pytest.raises(ViSpecError, match=r"loss\.balance: 0\.01 -> 0\.5"):
        check_same_settings(saved, now | {"loss.balance": 0.5})

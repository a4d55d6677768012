"""Whole runs on tiny targets: both teacher modes, how batches are cut, bad data, the head."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_store import TinyStore
from tests.train.runs import lines, losses, recipe, run, write_records
from vllm_vispec.heads.folder import inspect_head, load_draft
from vllm_vispec.train.cache import OfflineTeacher
from vllm_vispec.train.distributed import Processes, processes
from vllm_vispec.train.loop import fill_cache
from vllm_vispec.train.preflight import prepare
from vllm_vispec.train.target import TrainingTarget
from vllm_vispec.train.trainer import Trainer
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import ASIDE, read_json


@pytest.mark.parametrize("kind", ["vispec", "eagle_vlm", "msd"])
def test_online_and_offline_are_the_same(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, kind: str
) -> None:
    target = tiny.target("qwen2_5_vl")
    online = run(recipe(target, dialogues, tmp_path / "online", head__kind=kind))
    assert online.finished
    assert "acceptance length 1.00 is so low" in online.message
    # States of image rows are not stored unless the head reads them; others' do not suffice.
    with processes("cpu") as group:
        small = recipe(target, dialogues, tmp_path / "offline", teacher__mode="offline")
        assert "24 samples, 0 skipped" in fill_cache(small, group)
    run(recipe(target, dialogues, tmp_path / "offline", head__kind=kind, teacher__mode="offline"))
    first, second = losses(tmp_path / "online"), losses(tmp_path / "offline")
    assert list(first) == list(second) == [1, 2, 3, 4, 5, 6]
    assert first == pytest.approx(second, abs=1e-4, rel=1e-5)


def test_runs_share_a_cache_and_data_may_grow(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(dialogues.parent, tmp_path / "data"))
    text = (folder / "data.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(text[:20]))
    offline = {"teacher__mode": "offline", "teacher__shard_samples": 7}
    target = tiny.target("qwen2_5_vl")

    observe, seen = TrainingTarget.observe, []

    def count(target: TrainingTarget, samples: Any) -> Any:
        seen.extend(samples)
        return observe(target, samples)

    monkeypatch.setattr(TrainingTarget, "observe", count)

    def stored(name: str, file: str, **changes: Any) -> tuple[int, str]:
        """How many samples the target computes; what is said at the end."""
        seen.clear()
        config = recipe(target, folder / file, tmp_path / name, **offline | changes)
        with processes("cpu") as group:
            message = fill_cache(config, group)
        return len(seen), message

    assert stored("one", "few.jsonl")[0] == 20
    # A killed run left a shard half written, another run is writing one.
    states = next(tmp_path.glob("cache/*/float32"))
    left, new = (states / f"{ASIDE}{name}" for name in ("left", "new"))
    left.touch()
    new.touch()
    os.utime(left, (0, 0))
    # More samples, another order, another limit, another place.
    (folder / "all.jsonl").write_text("".join(reversed(text)))
    moved = shutil.copytree(folder, folder / "moved")
    assert stored("two", "all.jsonl")[0] == 4
    assert (left.exists(), new.exists()) == (False, True)
    monkeypatch.setattr(TrainingTarget, "load", lambda *_: pytest.fail("the target was loaded"))
    assert "24 samples, 0 skipped" in stored("three", f"{moved.name}/all.jsonl")[1]
    assert " 0 skipped" not in stored("three", "all.jsonl", data__max_length=60)[1]
    run(recipe(target, folder / "all.jsonl", tmp_path / "run", **offline))
    # A damaged shard is named, without a traceback out of another process.
    shard = next(tmp_path.glob("cache/*/float32/shard-*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    config = recipe(target, folder / "all.jsonl", tmp_path / "two", data__workers=1, **offline)
    with pytest.raises(
        ViSpecError, match=r"shard-\w+.safetensors cannot be read .*delete it"
    ) as bad:
        run(config)
    assert "\n" not in str(bad.value)
    shard.write_bytes(whole)
    # An image that changed is another sample.
    (folder / "1-0.png").write_bytes((folder / "4-0.png").read_bytes())
    with pytest.raises(pytest.fail.Exception, match="the target was loaded"):
        stored("four", "all.jsonl")


def test_processes_may_see_other_parts_of_a_cache(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One looks when another, of its run or of another run, has stored its share already."""
    monkeypatch.setattr("vllm_vispec.train.teacher._MEASURED_TOGETHER", 2)
    settings: dict[str, Any] = {"teacher__mode": "offline", "teacher__shard_samples": 2}
    config = recipe(tiny.target("qwen2_5_vl"), dialogues, tmp_path / "run", **settings)
    few = recipe(config.target.model, dialogues, tmp_path / "few", data__max_samples=1, **settings)
    with processes("cpu") as group:
        fill_cache(few, group)  # tables, which the first process writes
    config, corpus = prepare(config, 2)
    late: list[OfflineTeacher] = []

    class Group(Processes):
        def wait(self) -> None:
            stored = len([*tmp_path.glob("cache/*/lengths-*")]) > 1
            if self.rank == 0 and stored and not late:
                late.append(OfflineTeacher(config, corpus, Group(1, 2, self.device)))

    teacher = OfflineTeacher(config, corpus, Group(0, 2, torch.device("cpu")))
    assert len(late) == 1
    assert len([*teacher.ready([index] for index in teacher.lengths)]) == 24


def test_offline_is_recommended_for_more_epochs(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(tiny.target("qwen2_5_vl"), dialogues, tmp_path / "run", schedule__epochs=3,
                    schedule__max_steps=1)  # fmt: skip
    run(config)
    assert "in each of 3 epochs: teacher.mode=offline runs it once" in capsys.readouterr().out


def test_a_full_disk_is_found_before_the_target_is_loaded(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny.target("qwen2_5_vl")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(TrainingTarget, "load", lambda *_: pytest.fail("the target was loaded"))
    monkeypatch.setattr("vllm_vispec.train.preflight.check_disk", lambda *_: None)
    config = recipe(target, dialogues, tmp_path / "run", teacher__mode="offline")
    with pytest.raises(ViSpecError, match=r"states for 24 samples.*teacher\.cache_dir"):
        run(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch__size": 4, "batch__accumulate": 5, "loss__chunk_rows": 16},
        {"batch__size": 20, "batch__max_tokens": 200},
        pytest.param({"batch__size": 20, "run__compile": "on"}, marks=pytest.mark.slow),
    ],
    ids=["cut", "packed", "compiled"],
)
def test_a_step_is_the_same_however_it_is_computed(
    tiny: TinyStore,
    dialogues: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    # All samples in one step, so that both see the same ones; clipping must not hide a scale.
    passes, step = [], Trainer.step

    def count(self: Trainer, batches: Any, *rest: Any) -> Any:
        passes.append(len(batches))
        return step(self, batches, *rest)

    monkeypatch.setattr(Trainer, "step", count)
    target = tiny.target("llava")
    common = {"schedule__max_steps": 2, "optimizer__clip": "none", "optimizer__lr": 1e-4}
    run(recipe(target, dialogues, tmp_path / "one", batch__size=20, **common))
    run(recipe(target, dialogues, tmp_path / "two", **changes, **common))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)

    def norms(name: str) -> list[float]:
        return [line["gradient_norm"] for line in lines(tmp_path / name)]

    assert norms("one") == pytest.approx(norms("two"), rel=1e-4)
    assert passes[:2] == [1, 1]
    assert (passes[2] > 1) == ("run__compile" not in changes)


def test_training_learns_and_exports_the_head(
    tiny: TinyStore, dialogues: Path, tmp_path: Path
) -> None:
    target = tiny.target("qwen2_5_vl")
    config = recipe(target, dialogues, tmp_path / "run", schedule__max_steps=15,
                    run__validate_every=5, run__keep=1, optimizer__ema=0.9, loss__noise=0.1,
                    run__save_every=5)  # fmt: skip
    outcome = run(config)
    assert (outcome.finished, outcome.step) == (True, 15)
    found = list(losses(tmp_path / "run").values())
    assert found[-1] < 0.8 * found[0]
    head = inspect_head(tmp_path / "run" / "head")
    assert (head.config.target_model_type, head.config.compress) == ("qwen2_5_vl", True)
    points = read_json(tmp_path / "run" / "curve.json")
    assert [point["step"] for point in points] == [5, 10, 15]
    assert set(points[0]["acceptance_length"]) == {"chat", "pictures", "overall"}
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    provenance = read_json(tmp_path / "run" / "run.json")
    assert provenance["config"]["optimizer"]["ema"] == 0.9
    assert provenance["data"]["used"] == {"train": 19, "validation": 5}
    assert provenance["finished"]["step"] == 15
    # A second stage starts from it; a head that does not fit is refused.
    second = recipe(target, dialogues, tmp_path / "two", schedule__max_steps=1,
                    head__init_from=str(tmp_path / "run" / "head"), optimizer__lr=0.0)  # fmt: skip
    run(second)
    before, after = (load_draft(tmp_path / name / "head").state_dict() for name in ("run", "two"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    changes = {
        "head__num_query_tokens": (3, "num_query_tokens is 3"),
        "head__kind": ("eagle_vlm", "has no place for img_"),
    }
    for name, (value, message) in changes.items():
        wrong = {"head__init_from": str(tmp_path / "run" / "head"), name: value}
        with pytest.raises(ViSpecError, match=message):
            run(recipe(target, dialogues, tmp_path / "wrong", **wrong))


def test_a_run_ends_with_its_time(tiny: TinyStore, dialogues: Path, tmp_path: Path) -> None:
    limits = {"schedule__max_steps": 0, "schedule__minutes": 1e-6}
    assert run(recipe(tiny.target("llava"), dialogues, tmp_path / "run", **limits)).step == 1


def test_bad_samples_are_counted(tiny: TinyStore, dialogues: Path, tmp_path: Path) -> None:
    records = [json.loads(line) for line in dialogues.read_text().splitlines()]
    folder = Path(shutil.copytree(dialogues.parent, tmp_path / "data"))
    (folder / "1-0.png").unlink()
    (folder / "4-0.png").write_bytes(b"no picture")
    (folder / "7-0.png").write_bytes((dialogues.parent / "7-0.png").read_bytes()[:60])
    records[3]["messages"][1]["content"] = "a red ball " * 300
    data, target = write_records(folder / "data.jsonl", records), tiny.target("qwen2_5_vl")
    run(recipe(target, data, tmp_path / "run", schedule__max_steps=1, data__max_length=300))
    found = read_json(tmp_path / "run" / "run.json")["data"]
    assert (found["skipped"], found["records"], sum(found["used"].values())) == (4, 24, 20)
    assert {name: entry["count"] for name, entry in found["skipped_by_reason"].items()} == {
        "missing image": 1,
        "unreadable image": 2,
        "longer than data.max_length": 1,
    }
    with pytest.raises(ViSpecError, match=r"no usable sample, 23 were rejected \(first: sample-"):
        run(recipe(target, data, tmp_path / "none", data__max_length=5))


def test_text_heads_train_on_text(tiny: TinyStore, dialogues: Path, tmp_path: Path) -> None:
    target = tiny.target("llava_next")
    config = recipe(target, dialogues, tmp_path / "run", head__kind="eagle_text",
                    schedule__max_steps=2)  # fmt: skip
    run(config)
    assert read_json(tmp_path / "run" / "run.json")["data"]["used"]["train"] < 10
    assert not inspect_head(tmp_path / "run" / "head").config.has_adaptor
    # Stage 2 of another kind starts from a text head: what it lacks starts fresh.
    wider = recipe(target, dialogues, tmp_path / "wider", schedule__max_steps=1,
                   head__init_from=str(tmp_path / "run" / "head"), optimizer__lr=0.0)  # fmt: skip
    run(wider)
    text, images = (load_draft(tmp_path / name / "head").state_dict() for name in ("run", "wider"))
    assert set(text) < set(images)
    assert all(torch.equal(text[name], images[name]) for name in text)

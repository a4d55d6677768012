"""Recipes: YAML, assignments, errors that name the nearest key, and the table of defaults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_vispec.train.config import TrainConfig, config_from_flat, explain, load_config
from vllm_vispec.train.head_types import resolve
from vllm_vispec.train.run_log import command_line
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import iter_fields


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def test_recipe_and_assignments(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "data: {train: a.jsonl}\noptimizer:\n  lr: 3e-5\n  clip: norm\nrun: {autocast: off}\n"
        "loss: {weights: {l1: 2}}\n",
    )
    # A section may be left out of a name that no other has.
    config = load_config(file, ["lr=1e-4", "loss.weights.rank=0.5", "schedule.epochs=3"])
    assert config.data.train == ("a.jsonl",)
    # PyYAML reads 3e-5 as a text and `off` as False.
    assert (config.optimizer.lr, config.optimizer.clip) == (1e-4, "norm")
    assert config.run.autocast == "off"
    assert dict(config.loss.weights) == {"l1": 2.0, "rank": 0.5}
    assert config.schedule.epochs == 3.0
    assert config_from_flat(config.flat()) == config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimizer.lrr=1", "did you mean .optimizer.lr."),
        ("lrr=1", "did you mean .optimizer.lr."),
        ("mode=online", "in several sections: write loss.mode or teacher.mode in full"),
        ("optimzer.clip_at=1", "did you mean .optimizer."),
        ("zzzzzz=1", "--explain"),
        ("optimizer.lr", "has no '='"),
        ("optimizer.lr=fast", "give a number"),
        ("batch.size=2.5", "give a whole number"),
        ("batch.size=0", "at least 1"),
        ("data.validation_share=1.5", "at most 0.9"),
        ("optimizer.clip=sometimes", "one of value, norm, none"),
        ("loss.weights=3", "name: value pairs"),
        ("run.num_draft_tokens=33", "at most 32"),
    ],
)
def test_wrong_assignments(assignment: str, message: str) -> None:
    with pytest.raises(ViSpecError, match=message) as caught:
        load_config(None, [assignment])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimiser: {lr: 1}", "did you mean .optimizer."),
        ("optimizer: 3", "give name: value pairs of"),
        ("- 1", "holds no sections"),
        ("a: [", "is no YAML"),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ViSpecError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    with pytest.raises(ViSpecError, match="cannot be read"):
        load_config(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("head", "loss"),
    [
        ({"kind": "vispec"}, "vispec"),
        ({"kind": "eagle_vlm"}, "vispec"),
        ({"kind": "specvlm"}, "specvlm"),
        ({"kind": "vispec", "compressor": "prune:20"}, "specvlm"),
        ({"kind": "specvlm_global", "compressor": "query"}, "vispec"),
        ({"kind": "draft_vlm"}, "kl"),
    ],
)
def test_the_loss_follows_the_head(head: dict[str, str], loss: str) -> None:
    assignments = [f"head.{name}={value}" for name, value in head.items()]
    resolved = resolve(load_config(None, assignments))
    assert resolved.loss.name == loss
    assert resolve(resolved) == resolved
    assert resolve(load_config(None, [*assignments, "loss.name=kl"])).loss.name == "kl"


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["head.kind=medusa"], "head type 'medusa' is unknown"),
        (["compressor=jpeg:3"], "'jpeg:3' cannot be used: use one of query, "),
        (["compressor=prune:0"], "the ratio of prune is a whole number from 1"),
        (["compressor=weighted(prune:3,pool:4)"], "with one ratio"),
        (["compressor=select", "head.kind=eagle_vlm"], "sees no compressed images: drop it or use"),
        (["head.num_layers=2"], "head.num_layers is 2, which head.kind"),
        (["head.kind=specvlm", "head.trained=projector"], "head.trained is 'projector'"),
        (["head.kind=draft_vlm", "loss.name=specvlm"], "compares hidden states (feature)"),
        (["head.kind=draft_vlm", "loss.weights.feature=1"], "compares hidden states (feature)"),
        (["head.kind=draft_vlm", "loss.noise=0.2"], "a draft VLM reads none"),
        (["head.kind=draft_vlm", "head.trained=projector"], "would freeze a new draft VLM's"),
        (["head.kind=draft_vlm", "compressor=prune:3"], "sees no compressed images"),
        (["head.kind=draft_vlm", "input_norm=off"], "does not go with a draft VLM"),
    ],
)
def test_heads_that_cannot_be(assignments: list[str], message: str) -> None:
    with pytest.raises(ViSpecError, match=re.escape(message)):
        resolve(load_config(None, assignments))


def test_the_temperature_falls_linearly() -> None:
    loss = load_config(None, ["temperature_end=0.2"]).loss
    assert [round(loss.temperature(x), 6) for x in (0.0, 0.5, 1.0)] == [1.0, 0.6, 0.2]


def test_required_settings() -> None:
    with pytest.raises(ViSpecError, match=r"target\.model is not set"):
        TrainConfig().require_complete()
    endless = ["target.model=t", "data.train=d", "run.output=o", "schedule.epochs=0"]
    with pytest.raises(ViSpecError, match="nothing ends the training"):
        load_config(None, endless).require_complete()
    # The first limit ends it.
    both = load_config(None, ["schedule.epochs=2", "schedule.max_steps=30"]).schedule
    assert (both.total_steps(10), both.total_steps(100)) == (20, 30)


def test_every_setting_has_meaning_and_source() -> None:
    table = explain()
    assert "--set compressor=select" in table
    for name, field in iter_fields(TrainConfig):
        assert field.description, name
        assert dict(field.json_schema_extra)["source"], name  # type: ignore[arg-type]
        assert f"\n{name} " in f"\n{table}"


@pytest.mark.parametrize(
    ("program", "shown"),
    [
        ("/opt/env/bin/vispec", "vispec train a.yaml"),
        ("/somewhere/vllm_vispec/__main__.py", "vispec train a.yaml"),
        ("mine.py", "mine.py train a.yaml"),
    ],
)
def test_the_command_that_is_recorded(
    program: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [program, "train", "a.yaml"])
    assert command_line() == shown

"""The ablation's arms, numbers and page, without engines."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ablation import VARIANTS, draw, matched, to_markdown
from benchmarks.answers import (
    IMAGES,
    Asked,
    acceptance_length,
    decode_speedup,
    estimate,
    make_rows,
    ratio,
    read_all,
)
from benchmarks.study import EPOCHS, RECIPE, Study, Trained, Variant, Workspace
from examples.tiny_vlm.families import FAMILIES
from examples.tiny_vlm.questions import TEXT_FAMILY, short_answer, write_questions
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.types import Conversation
from vllm_vispec.train.config import load_config
from vllm_vispec.train.head_types import get_head_type

SEEDS = (0, 1, 2)


def _asked(accepted: int, families: tuple[str, ...] = tuple(FAMILIES)) -> list[Asked]:
    return [
        Asked(name, (accepted, accepted), 2 * accepted + 2, True, 4.0, 2.0) for name in families
    ]


def _write(workspace: Workspace, trained: Trained, asked: list[Asked]) -> None:
    file = workspace.result("cells", trained)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([asdict(one) for one in asked]))


def _rows(workspace: Workspace) -> list[dict[str, Any]]:
    variants = VARIANTS.values()
    return make_rows(read_all(workspace, variants, SEEDS), variants, SEEDS)


def study_of(root: Path) -> Study:
    return Study(Workspace(root), "target", tuple(VARIANTS.values()), SEEDS, 32, 7, 4, 1, 1)


@pytest.fixture
def measured(tmp_path: Path) -> Workspace:
    """Two neighbouring variants with results of all seeds, and one epoch of a third."""
    workspace = Workspace(tmp_path)
    for seed in SEEDS:
        _write(workspace, Trained(VARIANTS["adaptor"], EPOCHS, seed), _asked(1))
        _write(workspace, Trained(VARIANTS["global"], EPOCHS, seed), _asked(2))
        _write(workspace, Trained(VARIANTS["online"], 2, seed), _asked(3))
    return workspace


@pytest.mark.parametrize("arm", VARIANTS.values(), ids=list(VARIANTS))
def test_recipe_of_every_arm_is_valid(arm: Variant, tmp_path: Path) -> None:
    settings = study_of(tmp_path).recipe(arm, 1) | {"schedule.epochs": "2"}
    flags = [f"{name}={value}" for name, value in settings.items()]
    config = load_config(Path(RECIPE), flags).require_complete()
    assert config.run.seed == 1
    assert config.schedule.epochs == 2
    assert config.loss.passes == (5 if "loss.passes" in arm.settings else 1)
    assert get_head_type(config.head.kind).text_only == (arm.data == "text")


@pytest.mark.parametrize(
    "arm", [arm for arm in VARIANTS.values() if arm.after], ids=lambda a: a.name
)
def test_arm_changes_one_thing(arm: Variant) -> None:
    before = VARIANTS[arm.after]
    kind = {"head.kind": arm.settings["head.kind"]}
    rest = {name: value for name, value in arm.settings.items() if name not in kind}
    rest_before = {n: v for n, v in before.settings.items() if n != "head.kind"}
    changed = [
        kind["head.kind"] != before.settings["head.kind"],
        rest != rest_before,
        arm.answers != before.answers,
        arm.data != before.data,
    ]
    assert sum(changed) == 1


def test_acceptance_length_and_speedup() -> None:
    asked = [Asked("charts", (5, 2), 9, True, 6.0, 2.0), Asked("charts", (2,), 3, True, 2.0, 2.0)]
    assert acceptance_length(asked) == 1 + 9 / 3
    assert decode_speedup(asked) == 2.0


def test_interval_covers_seeds_and_questions() -> None:
    same = [_asked(2)] * 3
    found = estimate(same, acceptance_length)
    assert (found["mean"], found["low"], found["high"]) == (3.0, 3.0, 3.0)
    seeds = [_asked(1), _asked(2), _asked(3)]
    found = estimate(seeds, acceptance_length)
    assert found["seeds"] == [2.0, 3.0, 4.0]
    assert found["low"] == 2.0
    assert found["high"] == 4.0
    questions = [[*_asked(1), *_asked(5)]] * 3
    found = estimate(questions, acceptance_length)
    assert found["low"] < found["mean"] == 4.0 < found["high"]


def test_ratio_uses_the_same_draws() -> None:
    noisy = [[*_asked(1), *_asked(5)], [*_asked(2), *_asked(4)]]
    assert ratio(noisy, noisy, acceptance_length) == {
        "mean": 1.0,
        "low": 1.0,
        "high": 1.0,
        "seeds": [1.0, 1.0],
    }


def test_rows(measured: Workspace) -> None:
    rows = _rows(measured)
    assert [row["arm"] for row in rows] == ["adaptor", "global", "online"]
    assert [row["acceptance_length"][IMAGES]["mean"] for row in rows] == [2.0, 3.0, 4.0]
    assert rows[0]["acceptance_length_ratio"] is None
    assert rows[1]["acceptance_length_ratio"]["mean"] == 1.5
    assert (rows[1]["identical"], rows[1]["answers_compared"]) == (21, 21)
    tables = to_markdown({"rows": rows, "vispec_over_eagle": {}})
    assert "| + global feature | 3.00 (3.00-3.00) | 2.00 (2.00-2.00) | 1.50 (1.50-1.50)" in tables
    assert "online distillation, epoch 2" in tables


def test_row_waits_for_all_seeds(measured: Workspace) -> None:
    measured.result("cells", Trained(VARIANTS["global"], EPOCHS, 1)).unlink()
    assert [row["arm"] for row in _rows(measured)] == ["adaptor", "online"]


def test_matched_pairs(measured: Workspace) -> None:
    assert matched(read_all(measured, VARIANTS.values(), SEEDS)) == {}
    for seed in SEEDS:
        _write(measured, Trained(VARIANTS["regenerated"], EPOCHS, seed), _asked(3))
        _write(measured, Trained(VARIANTS["eagle_text"], EPOCHS, seed), _asked(1))
    gains = matched(read_all(measured, VARIANTS.values(), SEEDS))
    assert {name: gain["mean"] for name, gain in gains.items()} == {
        "regenerated over eagle_text": 2.0
    }
    assert "| `regenerated over eagle_text` | 2.00 (2.00-2.00) |" in to_markdown(
        {"rows": [], "vispec_over_eagle": gains}
    )


def test_wrong_answers_are_counted(measured: Workspace) -> None:
    first, *others = _asked(1)
    _write(
        measured,
        Trained(VARIANTS["adaptor"], EPOCHS, 0),
        [replace(first, identical=False), *others],
    )
    row = _rows(measured)[0]
    assert (row["identical"], row["answers_compared"]) == (20, 21)


def test_plot(measured: Workspace, tmp_path: Path) -> None:
    rows = {"rows": _rows(measured)}
    draw(rows, tmp_path / "plot.png")
    first = (tmp_path / "plot.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes() == first


def test_short_answer() -> None:
    assert short_answer("It shows {a red} {circle}. Nice.") == "a red circle"
    assert short_answer("I am fine. Thank you.") == "I am fine"


def test_questions_are_a_conversation_file(tmp_path: Path) -> None:
    file = write_questions(tmp_path, "heldout", 7, 14, tuple(FAMILIES))
    found = list(read_conversations(file, None))
    conversations = [item for item in found if isinstance(item, Conversation)]
    assert [item.family for item in conversations] == [*FAMILIES, *FAMILIES]
    for item in conversations:
        assert bool(item.images) == (item.family != TEXT_FAMILY)
        assert all((tmp_path / image).is_file() for image in item.images)
        assert item.turns[-1].role == "assistant"

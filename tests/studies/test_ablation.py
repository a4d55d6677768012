"""The ablation's variants, numbers and page, without engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.ablation import VARIANTS, draw, report, to_markdown
from benchmarks.answers import IMAGES
from benchmarks.calls import Call
from benchmarks.study import EPOCHS, RECIPE, Study, Trained, Variant
from examples.tiny_vlm.families import FAMILIES
from examples.tiny_vlm.questions import TEXT_FAMILY, short_answer, write_questions
from tests.studies.made_up import make_study, one_of_each, write_calls
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.types import Conversation
from vllm_vispec.train.config import load_config
from vllm_vispec.train.head_types import get_head_type

SEEDS = (0, 1, 2)


def write(study: Study, name: str, calls: list[Call], epochs: int = EPOCHS) -> None:
    for seed in SEEDS:
        write_calls(study, "cells", VARIANTS[name], epochs, seed, calls)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two neighbouring variants with results of all seeds, and one epoch of a third."""
    study = make_study(tmp_path, [*VARIANTS.values()], SEEDS)
    write(study, "adaptor", one_of_each(1))
    write(study, "global", one_of_each(2))
    write(study, "online", one_of_each(3))
    return study


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_recipe_of_every_variant_is_valid(variant: Variant, study: Study) -> None:
    settings = study.recipe(variant, 1) | {"schedule.epochs": "2"}
    flags = [f"{name}={value}" for name, value in settings.items()]
    config = load_config(Path(RECIPE), flags).require_complete()
    assert config.run.seed == 1
    assert config.schedule.epochs == 2
    assert config.loss.passes == (5 if "loss.passes" in variant.more else 1)
    assert get_head_type(config.head.kind).text_only == (variant.data == "text")
    if variant.after:
        # It changes one thing.
        before = VARIANTS[variant.after]
        names = ("kind", "more", "answers", "data")
        assert sum(getattr(variant, name) != getattr(before, name) for name in names) == 1


def test_rows(study: Study) -> None:
    content = report(study)
    rows = content["rows"]
    assert [row["variant"] for row in rows] == ["adaptor", "global", "online"]
    assert [row["acceptance_length"][IMAGES]["mean"] for row in rows] == [2.0, 3.0, 4.0]
    assert rows[0]["acceptance_length_ratio"] is None
    assert rows[1]["acceptance_length_ratio"]["mean"] == 1.5
    assert (rows[1]["identical"], rows[1]["answers_compared"]) == (21, 21)
    assert content["vispec_over_eagle"] == {}
    tables = to_markdown(content)
    assert "| + global feature | 3.00 (3.00-3.00) | 2.00 (2.00-2.00) | 1.50 (1.50-1.50)" in tables
    assert "online distillation, epoch 2" in tables


def test_a_row_waits_for_all_seeds_and_counts_wrong_answers(study: Study) -> None:
    study.result("cells", Trained(VARIANTS["global"], EPOCHS, 1)).unlink()
    first, *others = one_of_each(1)
    wrong = [replace(first, identical=(False,)), *others]
    write_calls(study, "cells", VARIANTS["adaptor"], EPOCHS, 0, wrong)
    rows = report(study)["rows"]
    assert [row["variant"] for row in rows] == ["adaptor", "online"]
    assert (rows[0]["identical"], rows[0]["answers_compared"]) == (20, 21)


def test_matched_pairs(study: Study) -> None:
    write(study, "regenerated", one_of_each(3))
    write(study, "eagle_text", one_of_each(1))
    content = report(study)
    gains = content["vispec_over_eagle"]
    assert {name: gain["mean"] for name, gain in gains.items()} == {
        "regenerated over eagle_text": 2.0
    }
    assert "| `regenerated over eagle_text` | 2.00 (2.00-2.00) |" in to_markdown(content)


def test_plot(study: Study, tmp_path: Path) -> None:
    files = tmp_path / "first.png", tmp_path / "second.png"
    for file in files:
        draw(report(study), file)
    first, second = (file.read_bytes() for file in files)
    assert first.startswith(b"\x89PNG")
    assert first == second


def test_questions_are_a_conversation_file(tmp_path: Path) -> None:
    file = write_questions(tmp_path, "heldout", 7, 14, tuple(FAMILIES))
    found = list(read_conversations(file, None))
    conversations = [item for item in found if isinstance(item, Conversation)]
    assert [item.family for item in conversations] == [*FAMILIES, *FAMILIES]
    for item in conversations:
        assert bool(item.images) == (item.family != TEXT_FAMILY)
        assert all((tmp_path / image).is_file() for image in item.images)
        assert item.turns[-1].role == "assistant"
    assert short_answer("It shows {a red} {circle}. Nice.") == "a red circle"
    assert short_answer("I am fine. Thank you.") == "I am fine"

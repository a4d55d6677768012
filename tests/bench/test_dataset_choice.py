"""Which samples are asked, on the questions of the tiny world."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.bench.dataset_files import by_id, picture, rejections, write_lines
from vllm_vispec.bench.datasets import (
    CATEGORIES,
    DatasetOptions,
    load_dataset,
)
from vllm_vispec.utils.errors import ViSpecError


def tiny_record(number: int, family: str, questions: int = 1) -> dict[str, Any]:
    """As examples.tiny_vlm.questions writes them."""
    messages: list[dict[str, Any]] = []
    for turn in range(questions):
        content: list[dict[str, str]] = [{"type": "text", "text": f"Question {turn}?"}]
        if turn == 0:
            content.insert(0, {"type": "image", "image": f"images/{number}.png"})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": "red circle"})
    return {"id": f"heldout-{number}", "family": family, "messages": messages}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Five records of each category."""
    records = []
    for number in range(30):
        family = CATEGORIES[number % len(CATEGORIES)]
        picture(tmp_path / "images" / f"{number}.png")
        records.append(tiny_record(number, family, 2 if family == "multi_turn" else 1))
    write_lines(tmp_path / "questions.jsonl", *records)
    return tmp_path


def test_tiny(tiny: Path) -> None:
    dataset = load_dataset("tiny", tiny)
    families = Counter(sample.family for sample in dataset.samples)
    assert families == {name: 10 if name == "multi_turn" else 5 for name in CATEGORIES}
    # The terse recorded answers are left out: the target's own stand there.
    last = by_id(dataset)["heldout-5#2"]
    assert [turn.role for turn in last.turns] == ["user", "user"]
    assert last.follow_up
    assert dataset == load_dataset("tiny", tiny / "questions.jsonl")


def test_limit_takes_the_families_in_turns(tiny: Path) -> None:
    dataset = load_dataset("tiny", tiny, DatasetOptions(limit=12))
    families = [sample.family for sample in dataset.samples]
    assert families == sorted(CATEGORIES) * 2
    assert dataset.not_chosen == 35 - 12
    assert "  23 more were not chosen" in dataset.notes()


def test_choice_is_stable(tiny: Path) -> None:
    small = load_dataset("tiny", tiny, DatasetOptions(limit=6)).samples
    large = load_dataset("tiny", tiny, DatasetOptions(limit=18)).samples
    assert large[:6] == small
    assert load_dataset("tiny", tiny).samples[:18] == large
    other = load_dataset("tiny", tiny, DatasetOptions(limit=6, seed=1)).samples
    assert {sample.sample_id for sample in other} != {sample.sample_id for sample in small}
    # A family's order does not depend on what else is in the file.
    file = tiny / "questions.jsonl"
    kept = [line for line in file.read_text().splitlines() if '"charts"' in line]
    write_lines(tiny / "charts.jsonl", *reversed(kept))
    alone = load_dataset("tiny", tiny / "charts.jsonl").samples
    mixed = load_dataset("tiny", tiny).samples
    assert list(alone) == [sample for sample in mixed if sample.family == "charts"]


def test_wanted_families(tiny: Path) -> None:
    options = DatasetOptions(families=("charts", "reasoning"), limit=3, max_tokens=7)
    samples = load_dataset("tiny", tiny, options).samples
    assert [sample.family for sample in samples] == ["charts", "reasoning", "charts"]
    assert {sample.max_tokens for sample in samples} == {7}
    with pytest.raises(
        ViSpecError, match=r"family maps has no usable sample.*; there are general_"
    ):
        load_dataset("tiny", tiny, DatasetOptions(families=("maps", "charts")))


def test_an_unreadable_image_makes_room_for_the_next_sample(tiny: Path) -> None:
    options = DatasetOptions(families=("charts",), limit=2)
    first = load_dataset("tiny", tiny, options).samples[0]
    Path(first.images[0]).write_bytes(b"no picture")
    dataset = load_dataset("tiny", tiny, options)
    assert len(dataset.samples) == 2
    assert list(rejections(dataset)) == [first.sample_id]

"""The study of the real pair: its recipes, its arithmetic and its page, without models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import real
from benchmarks.real_replay import (
    ALL,
    REPLAYED,
    VIEWS,
    Replay,
    acceptance,
    content,
    count,
    swap_images,
)
from benchmarks.study import HELD_OUT, Variant
from examples.real_vlm.words import names_content
from examples.tiny_vlm.questions import IMAGE_FAMILIES, write_questions
from examples.tiny_vlm.shipped import HEAD, TARGET
from tests.bench.fakes import World
from vllm_vispec.train.config import load_config
from vllm_vispec.train.head_types import resolve
from vllm_vispec.train.target import Observed
from vllm_vispec.utils.files import write_json

D = 4


@pytest.mark.parametrize("arm", real.ARMS.values(), ids=list(real.ARMS))
def test_arms_differ_in_what_they_see_of_an_image(arm: Variant, tmp_path: Path) -> None:
    study = real.RealStudy(tmp_path, "target", (arm,), (0,), 9, 18, 2)
    flags = [f"{name}={value}" for name, value in study.recipe(arm, 1).items()]
    config = resolve(load_config(study.base_recipe, flags).require_complete())
    usual = resolve(load_config(study.base_recipe))
    is_vlm = arm.name == "draft_vlm"
    assert config.schedule == usual.schedule
    assert config.batch == usual.batch
    assert config.head.input_norm == "on"
    assert (config.loss.name, config.loss.passes) == (("kl", 1) if is_vlm else ("specvlm", 3))
    assert (Path(config.data.train[0]).parent.name == "text") == (arm.name == "eagle_text")
    assert arm.epochs == (1,)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ((" A", " cat", "erpillar", " and", " Cats"), (0, 0, 0, 0, 1)),
        ((" The", " c", "at", " is", " at"), (0, 1, 1, 0, 0)),
        ((" two", " of", " 4", "2", " in", " one"), (1, 0, 1, 1, 0, 0)),
        (("top", " left", ".", "<|im_end|>"), (1, 1, 0, 0)),
    ],
)
def test_tokens_that_name_what_an_image_shows(
    pieces: tuple[str, ...], expected: tuple[int, ...]
) -> None:
    words = {"cat", "cats", "top", "left"}
    assert names_content(pieces, words) == [bool(one) for one in expected]


def _sample(name: str, family: str, runs: tuple[tuple[int, int], ...], value: float) -> Observed:
    rows_LD = value + torch.arange(10.0)[:, None].expand(-1, D)
    ids = torch.arange(10)
    return Observed(name, family, ids, ids > 6, runs, rows_LD, 100 + rows_LD)


def test_another_image_is_shown_to_the_draft_only() -> None:
    samples = [
        _sample("a", "x", ((2, 6),), 0.0),
        _sample("b", "y", ((1, 4),), 1000.0),
        _sample("c", "x", ((3, 5),), 2000.0),
    ]
    swapped = swap_images(samples)
    # Two rows stretched to four, and the first two of four; a family of one keeps its own.
    assert swapped[0].embeds_LD[2:6, 0].tolist() == [2003, 2003, 2004, 2004]
    assert swapped[2].embeds_LD[3:5, 0].tolist() == [2, 4]
    assert torch.equal(swapped[1].embeds_LD, samples[1].embeds_LD)
    for before, after in zip(samples, swapped, strict=True):
        start, end = before.runs[0]
        text = torch.ones(10, dtype=torch.bool)
        text[start:end] = False
        assert torch.equal(after.embeds_LD[text], before.embeds_LD[text])
        states = torch.where(text[:, None], before.embeds_LD, after.embeds_LD)
        states[end - 1] = before.embeds_LD[end - 1]  # a row of text reads it
        assert torch.equal(after.hidden_LD, 100 + states)
        assert torch.equal(after.token_ids, before.token_ids)
        assert torch.equal(after.answer, before.answer)
    assert samples[0].embeds_LD[2, 0] == 2


def test_drafts_are_counted_by_token_and_position() -> None:
    ids = torch.tensor([90, 91, 10, 11, 12, 13, 14, 15])
    start, end = 2, 8
    # Pass s at row p drafts token p + 2: the first pass is right but for token 13, later ones draft
    # from as many rows later on and are always right.
    drafted = torch.full((7, 8), -1)
    for s in range(7):
        drafted[s, start - 1 + s : end - 2] = ids[start + 1 + s : end]
    drafted[0, 3] = 77
    blind = torch.where(drafted >= 0, 77, -1)
    named = [True, False, False, True, True, False]  # of 10 to 15
    found = count("turns", ids, [drafted, drafted, blind], named, (start, end))
    # K = 3: 11, 12 and then 13 as a third token, with 14 as the bonus; then 15.
    assert found.accepted[0] == [3, 1]
    present, swapped, blanked = found.counts
    assert present == swapped
    content_counts, other_counts = present
    assert content_counts[:3] == [[1, 2], [2, 2], [2, 2]]  # 13 (wrong at first) and 14
    assert other_counts[:3] == [[3, 3], [2, 2], [1, 1]]  # 11, 12, 15
    assert [right for kind in blanked for right, _ in kind] == [0] * 14
    assert [[n for _, n in kind] for kind in blanked] == [[n for _, n in k] for k in present]


def _replay(family: str, accepted: int, right: tuple[int, int, int]) -> Replay:
    """Two steps, and ten tokens of each class at each position, `right` of them by view."""
    counts = [[[[n, 10]] * 7, [[9, 10]] * 7] for n in right]
    return Replay(family, [[accepted] * 2] * 3, counts)


def test_acceptance_and_what_the_image_is_worth() -> None:
    seeds = [[_replay("text", 1, (0, 0, 0)), _replay("turns", 3, (8, 5, 4))]] * 2
    found = acceptance(seeds)
    assert list(found) == ["text", "turns", ALL]
    lengths = [found[kind]["5"]["acceptance_length"]["mean"] for kind in found]
    assert lengths == [2.0, 4.0, 3.0]
    assert found[ALL]["5"]["acceptance_rate_per_position"] == [1.0, 0.5, 0.5, 0.0, 0.0]
    # Prompts without an image are left out.
    worth = content(seeds)
    assert worth["content"]["tokens"] == 10
    assert [worth["content"][view]["mean"][0] for view in VIEWS] == pytest.approx([0.8, 0.5, 0.4])
    assert worth["content"]["present - swapped"]["mean"] == pytest.approx([0.3] * 7)
    assert worth["content"]["present - blanked"]["low"] == pytest.approx([0.4] * 7)
    assert worth["other"]["present - blanked"]["mean"] == [0.0] * 7


def test_servers_are_compared_and_a_page_is_made(tmp_path: Path) -> None:
    variant = replace(real.ARMS[real.FIRST], name=real.QUICK)
    study = real.RealStudy(tmp_path, TARGET, (variant,), (0,), 9, 18, len(IMAGE_FAMILIES))
    (trained,) = study.heads()
    shutil.copytree(HEAD, study.head(trained))
    folder = study.questions(HELD_OUT)
    file = write_questions(folder, "heldout", 5, 12, IMAGE_FAMILIES, whole=True)
    file.rename(folder / "answers.jsonl")
    replays = [_replay("charts", 2, (8, 5, 4)).to_json() for _ in range(3)]
    write_json(study.result(REPLAYED, trained), replays)
    world = World()
    study.measure(world.tools())
    assert len(world.loads()) == 3 * (2 + 1)  # variants, loads; a warm-up each
    found = json.loads(json.dumps(study.findings()))
    (arm,) = found["arms"]
    rows = {(x["variant"], x["concurrency"], x["kind"]): x for x in arm["served"]}
    assert {name for name, _, _ in rows} == {"plain", "ngram", "vispec"}
    assert {kind for _, _, kind in rows} > {ALL, "charts"}
    assert rows["vispec", 1, ALL]["decode_speedup"]["mean"] == pytest.approx(1.0)
    assert rows["vispec", 1, ALL]["acceptance_length"] == 2.0
    assert rows["plain", 4, ALL]["identical_outputs"] == 1.0
    assert "decode_speedup" not in rows["plain", 4, ALL]
    text = real.to_markdown(found)
    assert "| ViSpec, 2 queries | content | 0.80, 0.30, 0.40 |" in text
    assert (
        "| ViSpec, 2 queries | vispec | bfloat16 | 5 | 1 | 0.0 | -1 | all kinds | 1.00 (1.00-1.00)"
        in text
    )
    real.draw(found, tmp_path / "real.png")
    assert (tmp_path / "real.png").read_bytes().startswith(b"\x89PNG")
    # Measured once.
    before = len(world.events)
    study.measure(world.tools())
    assert len(world.loads()) == 9
    assert len(world.events) == before

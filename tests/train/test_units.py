"""The size of the target's states does not matter: a rescaled target trains the same head."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.tiny_vlm.questions import IMAGE_FAMILIES, write_questions
from tests.support.tiny_store import TinyStore
from tests.train.runs import lines, losses, recipe, run
from tests.train.samples import HEADS, all_samples, random_draft
from vllm_vispec.train.rollout import rollout
from vllm_vispec.train.target import pad_batch
from vllm_vispec.train.units import units_of
from vllm_vispec.utils.files import read_json

TARGET = Path("examples/tiny_vlm/checkpoints/target")
FACTOR = 6


def rescale(target: Path, folder: Path) -> Path:
    """The same target with larger states: its final norm times `FACTOR`, its lm_head divided."""
    shutil.copytree(target, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("lm_head.weight"):
                tensors[name] = tensors[name] / FACTOR
            if name.endswith(("language_model.norm.weight", "model.norm.weight")):
                tensors[name] = tensors[name] * FACTOR
        save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", HEADS)
def test_a_head_in_the_targets_units_computes_the_same(name: str) -> None:
    unit, scaled = random_draft(HEADS[name]), random_draft(HEADS[name])
    units = units_of(unit.config, FACTOR, 0.2)
    scaled.load_state_dict(units.to_target(unit.state_dict(), unit.config))
    batch = pad_batch(all_samples())
    inside = rollout(unit, units.of_batch(batch), 3)
    for one, other in zip(inside, rollout(scaled, batch, 3), strict=True):
        states, wanted = other.state_BLD[other.counts_BL], one.state_BLD[one.counts_BL]
        torch.testing.assert_close(states, FACTOR * wanted, rtol=1e-3, atol=1e-3)


def test_a_rescaled_target_trains_the_same(
    tiny: TinyStore, dialogues: Path, tmp_path: Path
) -> None:
    target = tiny.target("llava")
    targets = {"as it is": target, "larger": rescale(target, tmp_path / "target")}
    for name, folder in targets.items():
        run(recipe(folder, dialogues, tmp_path / name, run__validate_every=3, loss__name="vispec"))
    one, other = (losses(tmp_path / name) for name in targets)
    assert one == pytest.approx(other, rel=1e-3)
    found = [lines(tmp_path / name, "validation")[-1]["acceptance_length"] for name in targets]
    assert found[0] == found[1]
    units = [read_json(tmp_path / name / "run.json")["units"] for name in targets]
    assert units[1]["state"] == pytest.approx(FACTOR * units[0]["state"], rel=1e-4)
    assert units[1]["embed"] == units[0]["embed"] != 1


@pytest.mark.slow
def test_the_tiny_pair_learns_as_fast_from_a_rescaled_target(tmp_path: Path) -> None:
    """A hundred steps: acceptance length within 3 %, and as high as PyTorch's start reaches."""
    data = write_questions(tmp_path, "train", 31_000_000, 368, IMAGE_FAMILIES, whole=True)
    found = []
    for name, target in (("one", TARGET), ("six", rescale(TARGET, tmp_path / "target"))):
        config = recipe(target, data, tmp_path / name, schedule__max_steps=100, batch__size=8,
                        data__validation_share=0.13, teacher__mode="offline", loss__name="kl",
                        optimizer__clip="norm", optimizer__clip_at=1.0,
                        run__num_draft_tokens=5, run__show_drafts=0)  # fmt: skip
        run(config)
        found.append(lines(tmp_path / name, "validation")[-1]["acceptance_length"]["overall"])
    assert found[1] == pytest.approx(found[0], rel=0.03)
    assert min(found) > 3.4

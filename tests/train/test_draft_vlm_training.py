"""Draft VLMs in training: loss, stages, export, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.heads import random_draft_vlm
from tests.support.tiny_store import TinyStore
from tests.train.language_models import write_language_model
from tests.train.runs import losses, recipe, run
from tests.train.samples import random_sample
from vllm_vispec.evaluate.options import EvalOptions
from vllm_vispec.evaluate.run import evaluate
from vllm_vispec.heads.config import DRAFT_VLM_ARCHITECTURE
from vllm_vispec.heads.folder import load_draft
from vllm_vispec.train.checkpoint import Checkpoints
from vllm_vispec.train.config import LossSettings, TrainConfig
from vllm_vispec.train.losses import Objective
from vllm_vispec.train.target import pad_batch
from vllm_vispec.utils.files import read_json

TARGET_HEAD = torch.randn(64, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("chunk_rows", [7, 2048])
def test_the_loss_is_that_of_its_own_logits(chunk_rows: int) -> None:
    draft, one = random_draft_vlm(), random_sample(26, ((2, 7),), [(12, 26)])
    settings = LossSettings(name="kl", passes=3, chunk_rows=chunk_rows)
    sums = Objective(draft, TARGET_HEAD, settings)(pad_batch([one]))
    states_LD = draft(one.token_ids[None], one.embeds_LD[None], [one.runs])[0]
    rows = torch.arange(10, 24)
    ours = (states_LD[rows] @ draft.head_VD.T).log_softmax(-1)
    theirs = (one.hidden_LD[rows + 1] @ TARGET_HEAD.T).log_softmax(-1)
    wanted = (theirs.exp() * (theirs - ours)).sum()
    torch.testing.assert_close(sums.loss, wanted, atol=1e-3, rtol=1e-4)
    assert int(sums.of_rows["rows"]) == len(rows)
    sums.loss.backward()
    assert all(parameter.grad is not None for parameter in draft.parameters())


def small(target: Path, data: Path, output: Path, **changes: Any) -> TrainConfig:
    """A draft VLM of two narrow layers, for five steps unless changed."""
    sizes = {"head__num_layers": 2, "head__hidden_size": 32, "head__num_heads": 2}
    sizes = {} if "head__init_from" in changes else sizes
    return recipe(target, data, output, head__kind="draft_vlm", run__threads=1,
                  **({"schedule__max_steps": 5, **sizes} | changes))  # fmt: skip


def test_trained_exported_and_evaluated(tiny: TinyStore, dialogues: Path, tmp_path: Path) -> None:
    target = tiny.target("qwen2_5_vl")
    config = small(target, dialogues, tmp_path / "run", optimizer__ema=0.5, optimizer__lr=3e-3,
                   run__export="last")  # fmt: skip
    outcome = run(config)
    assert outcome.head is not None
    loss = losses(tmp_path / "run")
    assert loss[5] < loss[1]
    written = read_json(outcome.head / "config.json")
    assert written["architectures"] == [DRAFT_VLM_ARCHITECTURE]
    assert (written["num_hidden_layers"], written["hidden_size"]) == (2, 32)
    saved = Checkpoints(tmp_path / "run" / "checkpoints", 1).load(5).groups["average"]
    exported = load_draft(outcome.head).state_dict()
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
    options = EvalOptions(target=str(target), head=str(outcome.head), data=dialogues,
                          num_speculative_tokens=3, device="cpu")  # fmt: skip
    report = evaluate(options)
    assert report.samples == 24
    assert report.simulated["overall"].acceptance_length >= 1


def test_two_stages_from_a_language_model(tiny: TinyStore, dialogues: Path, tmp_path: Path) -> None:
    target = tiny.target("qwen2_5_vl")
    model = write_language_model(tmp_path / "lm", vocab_size=1024)
    first = run(small(target, dialogues, tmp_path / "first", head__trained="projector",
                      head__init_from=str(tmp_path / "lm"), optimizer__ema=0.9))  # fmt: skip
    assert first.head is not None
    one = load_draft(first.head)
    assert torch.equal(one.head_VD, model.lm_head.weight)
    assert torch.equal(one.norm.weight, model.model.norm.weight)
    assert not torch.equal(one.projector.linear_1.bias, torch.zeros(24))
    second = run(small(target, dialogues, tmp_path / "second", run__export="last",
                       head__init_from=str(first.head)))  # fmt: skip
    assert second.head is not None
    two = load_draft(second.head)
    names = [name for name, parameter in two.named_parameters()
             if torch.equal(parameter, one.state_dict()[name])]  # fmt: skip
    assert names == []
    assert losses(tmp_path / "second")[5] < losses(tmp_path / "first")[1]

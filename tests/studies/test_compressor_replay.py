"""Replay of held-out answers and the states that gates are asked about."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.compressors import findings
from benchmarks.compressors.findings import question_states
from benchmarks.compressors.variants import VARIANTS
from benchmarks.study import Trained, Workspace
from vllm_vispec.reference import ViSpecDraft
from vllm_vispec.train.batch import Observed, Runs
from vllm_vispec.train.head_types import new_head_config

WIDTH, VOCAB = 32, 64


class TextConfig:
    """What `new_head_config` reads of a target."""

    hidden_size, intermediate_size, num_attention_heads = WIDTH, 48, 4
    vocab_size, max_position_embeddings, rms_norm_eps = VOCAB, 256, 1e-6
    rope_parameters = {"rope_theta": 10_000.0}  # noqa: RUF012


def observed(name: str, runs: Runs, answers: tuple[tuple[int, int], ...], length: int) -> Observed:
    generator = torch.Generator().manual_seed(length)
    answer = torch.zeros(length, dtype=torch.bool)
    for start, end in answers:
        answer[start:end] = True
    return Observed(
        name,
        "charts",
        torch.randint(VOCAB, (length,), generator=generator),
        answer,
        runs,
        torch.randn(length, WIDTH, generator=generator),
        torch.randn(length, WIDTH, generator=generator),
    )


def test_gates_are_asked_behind_an_image_only() -> None:
    one = observed("one", ((4, 9),), ((2, 4), (12, 15), (20, 22)), 24)
    text = observed("text", (), ((3, 6),), 8)
    states = [state for _, state in question_states([one, text])]
    assert torch.equal(torch.stack(states), one.hidden_LD[[11, 19]])


def test_replay_of_a_batch_is_that_of_each_sample() -> None:
    torch.manual_seed(0)
    config = new_head_config("specvlm", TextConfig, compressor="select")
    draft = ViSpecDraft(config).eval()
    samples = [
        observed("a", ((4, 30),), ((33, 45),), 46),
        observed("b", (), ((3, 9),), 10),
        observed("c", ((1, 3), (5, 25)), ((27, 30), (33, 40)), 41),
    ]
    target: Any = SimpleNamespace(lm_head_VD=torch.randn(VOCAB, WIDTH))
    together = findings.replay_all(draft, target, samples)
    assert together == [findings.replay_all(draft, target, [one])[0] for one in samples]
    # Every answer token but the first of each answer comes out of a round.
    for found, tokens in zip(together, (11, 5, 2 + 6), strict=True):
        assert sum(found.accepted) + len(found.accepted) == tokens


def test_nothing_is_computed_twice(tmp_path: Path, monkeypatch: Any) -> None:
    workspace, cell = Workspace(tmp_path), Trained(VARIANTS["select"], 2, 0)
    file = workspace.result("replayed", cell)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([{"family": "charts", "accepted": [1, 0]}]))
    monkeypatch.setattr(findings, "observe", lambda *_: 1 / 0)
    findings.look_at_held_out(workspace, "target", [cell])
    assert json.loads(file.read_text()) == [{"family": "charts", "accepted": [1, 0]}]

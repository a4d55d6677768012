"""Ends of single paths on the V2 runner, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from tests.support.operators import RecordedGraph
from vllm_vispec.trees.grow import NO_TOKEN, PathGrower
from vllm_vispec.trees.paths import PathEnds, PathRejectionSampler, PathSpeculator
from vllm_vispec.trees.settings import Policy, TreeSettings
from vllm_vispec.trees.verify import TreeTable

CPU = torch.device("cpu")
REQUESTS, LEVELS, VOCAB = 64, 6, 40


@pytest.mark.parametrize("policy", ["spec_llava", "entropy"])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3])
@torch.inference_mode()
def test_paths_end_where_v1_cuts_them(policy: Policy, threshold: float) -> None:
    """Eagerly, and where one recorded step is replayed for all."""
    settings = TreeSettings(policy=policy, depth=LEVELS - 1, top_k=3, threshold=threshold)
    generator = torch.Generator().manual_seed(0)
    ends, step = PathEnds(settings, REQUESTS, CPU), torch.tensor(0)
    # Batches shrink and grow again; nothing of an earlier one is left.
    for count in (REQUESTS, 5, REQUESTS):
        scale = torch.rand(count, 1, generator=generator) * 8
        logits = [scale * torch.randn(count, VOCAB, generator=generator) for _ in range(LEVELS)]
        grower = PathGrower(settings.one_branch())
        grower.start_trees(logits[0])
        for rows in logits[1:]:
            grower.grow_level(rows.unsqueeze(1))
        expected = (grower.finish_paths(LEVELS) != NO_TOKEN).sum(1)
        buffer = torch.zeros(count, VOCAB)
        with RecordedGraph() as graph:
            ends.go_on(buffer, step)
        for run in (graph.replay, lambda rows=buffer: ends.go_on(rows, step)):
            for level, rows in enumerate(logits):
                buffer.copy_(rows)
                step.fill_(level)
                run()
            assert torch.equal(ends.length[:count], expected)
            ends.length.zero_()
        if threshold == 0.3 and count == REQUESTS:
            assert len(set(expected.tolist())) >= 3


def test_what_lies_behind_an_end_is_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a grammar did not see stays unverified, too."""
    given: list[torch.Tensor] = []
    monkeypatch.setattr(RejectionSampler, "__init__", lambda *_: None)
    monkeypatch.setattr(RejectionSampler, "__call__", lambda *args: given.append(args[-1]))
    sampler: Any = PathRejectionSampler(
        None,
        None,
        CPU,
        torch.tensor([0, 2, 9]),
    )
    batch: Any = SimpleNamespace(
        expanded_local_pos=torch.tensor([0, 1, 2, 0, 1, 2, 3, 0]),
        expanded_idx_mapping=torch.tensor([0, 0, 0, 1, 1, 1, 1, 2]),
    )
    sampler(None, batch)
    cut = [False, True, True, False, False, False, True, False]
    assert given[0].tolist() == cut
    unseen = torch.tensor([False] * 4 + [True] + [False] * 3)
    sampler(None, batch, None, unseen)
    assert given[1].tolist() == [*cut[:4], True, *cut[5:]]


def test_a_scheduled_chain_of_an_engine_with_trees_ends_too() -> None:
    table = TreeTable(LEVELS, 12, 4, CPU)
    slots = torch.tensor([2, 0])
    table.write_chains(slots, torch.tensor([3, 0]))
    assert table.is_node[slots].sum(1).tolist() == [3, 0]
    assert table.is_node[2, 1:4].all()
    table.write_chains(slots)
    assert table.is_node[slots].sum(1).tolist() == [LEVELS] * 2


@pytest.mark.parametrize("trims", [False, True])
def test_the_target_did_not_reject_what_was_cut(
    trims: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed: list[list[int]] = []
    monkeypatch.setattr(
        EagleSpeculator, "observe_verification", lambda *args: observed.append(args[-1].tolist())
    )
    speculator: Any = object.__new__(PathSpeculator)
    speculator._trims_drafts, speculator.path_length = trims, torch.tensor([2, 0, 2, 4])
    # All before the end accepted; no token before the end; rejected before it; the last one.
    slots, sampled = torch.tensor([0, 1, 2, 3]), torch.tensor([3, 1, 2, 5])
    speculator.observe_verification(slots, sampled, torch.tensor([2, 4, 3, 0]))
    assert observed == [[0, 0, 3, 0] if trims else [2, 4, 3, 0]]

"""Drafting and verifying trees reads nothing back, and runs operators by sizes alone."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from tests.support.operators import Record
from tests.support.tree_models import VOCAB
from vllm_vispec.trees.code_rows import CodeRows
from vllm_vispec.trees.grow import TreeGrower, best_path, replace_rows
from vllm_vispec.trees.policies import POLICIES
from vllm_vispec.trees.rounds import TreeRound, TreeTable
from vllm_vispec.trees.settings import TreeSettings

NODES, REQUESTS, SLOTS = 12, 3, 6
CPU = torch.device("cpu")
TREES = [name for name in POLICIES if name != "chain"]


class Inputs(NamedTuple):
    """What differs from round to round; shapes are the same."""

    root_RV: torch.Tensor
    level_RWV: torch.Tensor
    sampled_S: torch.Tensor
    needs_chain_R1: torch.Tensor
    slot_R: torch.Tensor


def _inputs(seed: int, settings: TreeSettings, num_rows: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    # From drafts that know nothing to drafts that are sure: all kinds of trees.
    sharpness = (0.1, 3.0, 30.0)[seed % 3]
    return Inputs(
        sharpness * torch.randn(REQUESTS, VOCAB, generator=generator),
        sharpness * torch.randn(REQUESTS, settings.top_k, VOCAB, generator=generator),
        torch.randint(VOCAB, (num_rows,), generator=generator),
        torch.rand(REQUESTS, 1, generator=generator) < 0.5,
        torch.randperm(SLOTS, generator=generator)[:REQUESTS],
    )


def _round(
    inputs: Inputs, settings: TreeSettings, table: TreeTable, codes: CodeRows, count_R: torch.Tensor
) -> None:
    """Draft trees, give some requests chains, verify, and say what moves."""
    grower = TreeGrower(settings)
    grower.start(inputs.root_RV)
    for _ in range(settings.depth):
        frontier = grower.expand(inputs.level_RWV)
        codes.set(torch.arange(frontier.token.numel()), frontier.path.flatten(0, 1), NODES)
    tree = grower.finish(NODES)
    tree = replace_rows(tree, best_path(tree), inputs.needs_chain_R1)
    table.write(inputs.slot_R, tree)
    num_rows = len(inputs.sampled_S)
    start_R = (count_R + 1).cumsum(0) - count_R - 1
    token_S = torch.arange(num_rows)
    batch = TreeRound(table, inputs.slot_R, start_R, count_R, token_S, num_rows)
    codes.set(token_S, batch.path, num_rows)
    batch.moves(batch.walk(inputs.sampled_S, inputs.sampled_S))
    table.write_chains(inputs.slot_R)


@pytest.mark.parametrize("policy", TREES)
def test_rounds_are_static(policy: str) -> None:
    settings = TreeSettings(policy=policy, depth=3, top_k=4)
    count_R = torch.tensor([NODES, 5, 0])
    num_rows = int((count_R + 1).sum())
    table = TreeTable(settings, NODES, SLOTS, CPU)
    codes = CodeRows(settings, 64, torch.float32, CPU)
    rounds = [_inputs(seed, settings, num_rows) for seed in range(6)]
    _round(rounds[0], settings, table, codes, count_R)
    record = Record()
    for inputs in rounds:
        with record.watching("round"):
            _round(inputs, settings, table, codes, count_R)
    assert record.violations == []
    first, *others = record.passes["round"]
    assert len(first) > 50
    assert all(ops == first for ops in others)

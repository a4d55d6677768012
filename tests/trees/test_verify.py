"""Verification against one request at a time with plain lists; positions, moves and chains."""

from __future__ import annotations

import pytest
import torch

from tests.support.operators import Record
from tests.support.tree_models import VOCAB, grow, random_model, slow_walk
from vllm_vispec.trees.codes import UNUSED
from vllm_vispec.trees.grow import DraftTree, best_path, replace_rows
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.trees.verify import TreeBatch, TreeTable, verify_trees

SETTINGS = TreeSettings(depth=3, top_k=4)
NODES, SLOTS = 12, 6
CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(6))
def test_accepted_paths(seed: int) -> None:
    settings, requests, nodes = TreeSettings(depth=4, top_k=5), 40, 33
    tree = grow(random_model(seed), settings, requests, nodes)
    generator = torch.Generator().manual_seed(seed)
    root = torch.zeros(requests, 1, dtype=torch.int64)
    token, parent = torch.cat([root, tree.token], 1), torch.cat([root, tree.parent], 1)
    # Requests end their trees where they like, as a scheduler may.
    length = torch.randint(0, nodes + 1, (requests, 1), generator=generator)
    token[torch.arange(nodes + 1) > length] = -1
    sampled = torch.randint(0, VOCAB, token.shape, generator=generator)
    # The target agrees with some child of most nodes.
    for request in range(requests):
        for node in range(nodes, 0, -1):
            if (node + request) % 5 and token[request, node] >= 0:
                sampled[request, parent[request, node]] = token[request, node]
    found = verify_trees(sampled, token, parent, settings.levels)
    lengths = set()
    for request in range(requests):
        rows = (part[request].tolist() for part in (sampled, token, parent))
        path = slow_walk(*rows)
        count = len(path) - 1
        lengths.add(count)
        assert found.num_accepted[request] == count
        assert found.path[request].tolist() == [*path, *range(len(path), settings.levels + 1)]
        emitted = [int(sampled[request, node]) for node in path]
        assert found.token[request].tolist() == emitted + [-1] * (settings.levels - count)
    assert lengths >= {0, 1, 2, 3}, "the paths must differ in length"


def test_paths_of_every_length() -> None:
    """Chains of 1 to 16 tokens, rejected at every place; a tree with all paths rejected."""
    for levels in range(1, 17):
        token = torch.arange(levels + 1).expand(levels + 1, -1)
        wrong = torch.arange(levels + 1)
        sampled = (token + 1).scatter(1, wrong.unsqueeze(1), 99)
        found = verify_trees(sampled, token, (token - 1).clamp(min=0), levels)
        assert found.num_accepted.tolist() == wrong.tolist()
    token, parent = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 0, 0]])
    found = verify_trees(torch.tensor([[9, 1, 2]]), token, parent, levels=2)
    assert [part.tolist() for part in found] == [[[0, 1, 2]], [0], [[9, -1, -1]]]


def _tables() -> tuple[TreeTable, DraftTree]:
    """Return a table whose slots 3, 1 and 4 hold the trees of requests 0, 1 and 2."""
    table = TreeTable(SETTINGS.levels, NODES, SLOTS, CPU)
    tree = grow(random_model(7), SETTINGS, 3, NODES)
    table.write_trees(torch.tensor([3, 1, 4]), tree)
    return table, tree


def _batch(table: TreeTable, slots: list[int], counts: list[int], gap: int = 0) -> TreeBatch:
    """Return a batch; ``gap`` prompt tokens stand before each request's rows of logits."""
    starts = torch.tensor([0, *counts]).cumsum(0) + torch.arange(len(counts) + 1)
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts) + 1)
    token_S = torch.arange(int(starts[-1])) + gap * (owner + 1)
    return TreeBatch(table, torch.tensor(slots), starts, token_S, int(token_S[-1]) + 1)


def test_positions_are_levels() -> None:
    table, tree = _tables()
    batch = _batch(table, [3, table.no_tree, 4], [NODES, 3, 5], gap=2)
    depth = [0, *tree.depth[0].tolist(), 0, 1, 2, 3, 0, *tree.depth[2, :5].tolist()]
    assert batch.depth.tolist() == depth
    place = torch.tensor([*range(NODES + 1), 0, 1, 2, 3, *range(6)])
    for shape in ((), (3,)):  # as M-RoPE has them
        positions = torch.zeros(*shape, batch.num_tokens, dtype=torch.int64)
        positions[..., batch.token_index] = place
        before = positions.clone()
        batch.shift_positions(positions, 1)
        assert (positions[..., batch.token_index] == torch.tensor(depth)).all()
        batch.shift_positions(positions, -1)
        assert torch.equal(positions, before)
    assert bool((batch.path[NODES + 1 : NODES + 5] == UNUSED).all()), "no tree, no codes"
    assert torch.equal(batch.path[1 : NODES + 1], tree.path[0])


def test_a_slot_may_hold_a_chain() -> None:
    """Drafts that are a chain leave nothing of the tree that the slot held before."""
    table, tree = _tables()
    table.write_chains(torch.tensor([3, 4]))
    batch = _batch(table, [3, 1], [3, NODES])
    assert batch.depth.tolist() == [0, 1, 2, 3, 0, *tree.depth[1].tolist()]
    token = torch.tensor([0, 5, 6, 7, 0, *tree.token[1].tolist()])
    sampled = torch.full_like(token, VOCAB + 1)
    sampled[:3] = torch.tensor([5, 6, 9])
    found, _ = batch.verify(sampled, token)
    assert found.num_accepted.tolist() == [2, 0]
    assert found.token[0, :3].tolist() == [5, 6, 9]


def test_accepted_paths_move_to_the_front() -> None:
    table, tree = _tables()
    batch = _batch(table, [3, table.no_tree, 4], [NODES, 0, 7], gap=1)
    token = torch.cat([torch.tensor([0]), tree.token[0], torch.tensor([0, 0]), tree.token[2, :7]])
    # The target follows the deepest node of request 0 and rejects all of request 2.
    sampled = torch.full_like(token, VOCAB + 1)
    node = int(tree.depth[0].argmax()) + 1
    path = [node]
    while node:
        parent = int(tree.parent[0, node - 1])
        sampled[parent] = tree.token[0, node - 1]
        node = parent
        path.insert(0, node)
    found, moves = batch.verify(sampled, token)
    assert found.num_accepted.tolist() == [len(path) - 1, 0, 0]
    rows = torch.arange(len(token))
    moved = rows.clone()
    moved[moves.place] = rows[moves.source]
    assert moved.tolist() == [*path, *range(len(path), len(token))]
    assert moves.is_draft.view(3, -1).sum(1).tolist() == [len(path) - 1, 0, 0]


def test_empty_places_are_no_drafts() -> None:
    """Whatever token vLLM embeds there: the table knows."""
    table = TreeTable(SETTINGS.levels, NODES, SLOTS, CPU)
    chains = best_path(grow(random_model(7), SETTINGS, 1, NODES))
    table.write_trees(slice(1), chains)
    token = torch.cat([torch.tensor([0]), chains.token[0].clamp(min=0)])
    sampled = torch.cat([token[1:], torch.tensor([0])])
    found, _ = _batch(table, [0], [NODES]).verify(sampled, token)
    assert found.num_accepted.tolist() == [int((chains.token >= 0).sum())]
    assert int(found.num_accepted) < NODES


def test_some_requests_get_chains() -> None:
    """Chosen on the device: nothing waits for it."""
    (_, tree), record = _tables(), Record()
    with record.watching("chains"):
        chosen = replace_rows(tree, best_path(tree), torch.tensor([[False], [True], [False]]))
    assert record.violations == []
    for part, mine, theirs in zip(chosen, tree, best_path(tree), strict=True):
        assert torch.equal(part[[0, 2]], mine[[0, 2]])
        assert torch.equal(part[1], theirs[1])

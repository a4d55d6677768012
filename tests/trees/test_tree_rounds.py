"""Rounds over ragged batches: positions, codes, walks and moves against single requests."""

from __future__ import annotations

import torch

from tests.support.tree_models import VOCAB, grow, random_model
from vllm_vispec.models.padded_rows import PaddedRows
from vllm_vispec.trees.code_rows import CodeRows
from vllm_vispec.trees.codes import UNUSED, encode, word_tables
from vllm_vispec.trees.grow import DraftTree, best_path, replace_rows
from vllm_vispec.trees.rounds import TreeRound, TreeTable
from vllm_vispec.trees.settings import TreeSettings

SETTINGS = TreeSettings(depth=3, top_k=4)
NODES, SLOTS = 12, 6
CPU = torch.device("cpu")


def _tables() -> tuple[TreeTable, DraftTree]:
    """Return a table whose slots 3, 1 and 4 hold the trees of requests 0, 1 and 2."""
    table = TreeTable(SETTINGS, NODES, SLOTS, CPU)
    tree = grow(random_model(7), SETTINGS, 3, NODES)
    table.write(torch.tensor([3, 1, 4]), tree)
    return table, tree


def _round(table: TreeTable, slots: list[int], counts: list[int], gap: int = 0) -> TreeRound:
    """Return a batch; ``gap`` prompt tokens stand before each request's rows of logits."""
    count_R = torch.tensor(counts)
    ends = (count_R + 1).cumsum(0)
    start_R = ends - count_R - 1
    tokens: list[int] = []
    at = 0
    for count in counts:
        tokens += range(at + gap, at + gap + count + 1)
        at += gap + count + 1
    return TreeRound(table, torch.tensor(slots), start_R, count_R, torch.tensor(tokens), at)


def test_positions_are_levels() -> None:
    table, tree = _tables()
    batch = _round(table, [3, table.no_tree, 4], [NODES, 3, 5], gap=2)
    depth = [0, *tree.depth[0].tolist(), 0, 1, 2, 3, 0, *tree.depth[2, :5].tolist()]
    assert batch.depth.tolist() == depth
    place = [*range(NODES + 1), 0, 1, 2, 3, *range(6)]
    assert (batch.position_shift + torch.tensor(place)).tolist() == depth
    assert bool((batch.path[NODES + 1 : NODES + 5] == UNUSED).all()), "no tree, no codes"
    assert torch.equal(batch.path[1 : NODES + 1], tree.path[0])


def test_a_slot_may_hold_a_chain() -> None:
    """Drafts that are a chain leave nothing of the tree that the slot held before."""
    table, tree = _tables()
    table.write_chains(torch.tensor([3, 4]))
    batch = _round(table, [3, 1], [3, NODES])
    assert batch.depth.tolist() == [0, 1, 2, 3, 0, *tree.depth[1].tolist()]
    token = torch.tensor([0, 5, 6, 7, 0, *tree.token[1].tolist()])
    sampled = torch.full_like(token, VOCAB + 1)
    sampled[:3] = torch.tensor([5, 6, 9])
    found = batch.walk(sampled, token)
    assert found.accepted.tolist() == [2, 0]
    assert found.token[0, :3].tolist() == [5, 6, 9]


def test_accepted_paths_move_to_the_front() -> None:
    table, tree = _tables()
    counts = [NODES, 0, 7]
    batch = _round(table, [3, table.no_tree, 4], counts, gap=1)
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
    found = batch.walk(sampled, token)
    assert found.accepted.tolist() == [len(path) - 1, 0, 0]
    moves = batch.moves(found)
    rows = torch.arange(len(token))
    moved = rows.clone()
    moved[moves.place] = rows[moves.source]
    expected = [*path, *range(len(path), NODES + 1), *range(NODES + 1, len(token))]
    assert moved.tolist() == expected
    is_draft = moves.is_draft.view(3, -1).sum(1)
    assert is_draft.tolist() == [len(path) - 1, 0, 0]


def test_empty_places_are_no_drafts() -> None:
    """Whatever token vLLM embeds there: the table knows."""
    table = TreeTable(SETTINGS, NODES, SLOTS, CPU)
    tree = grow(random_model(7), SETTINGS, 1, NODES)
    chains = best_path(tree)
    table.write(slice(1), chains)
    length = int((chains.token >= 0).sum())
    token = torch.cat([torch.tensor([0]), chains.token[0].clamp(min=0)])
    sampled = torch.cat([token[1:], torch.tensor([0])])
    found = _round(table, [0], [NODES]).walk(sampled, token)
    assert found.accepted.tolist() == [length]
    assert length < NODES


def test_some_requests_get_chains() -> None:
    _, tree = _tables()
    chosen = replace_rows(tree, best_path(tree), torch.tensor([[False], [True], [False]]))
    for part, mine, theirs in zip(chosen, tree, best_path(tree), strict=True):
        assert torch.equal(part[[0, 2]], mine[[0, 2]])
        assert torch.equal(part[1], theirs[1])


QUERY, KEY = (4, 3, 19), (2, 3, 19)  # heads, head size, padded head size


def _channels(rows: PaddedRows) -> torch.Tensor:
    """Return what stands behind each token's first head, ``[T, 16]``."""
    return rows.views(32)[0][:, 0, 3:]


def test_codes_are_set_and_cleared() -> None:
    rows = CodeRows(SETTINGS, 32, torch.float32, CPU)
    query, key, value = rows.query(QUERY), rows.key(KEY), rows.plain("value", KEY)
    path = torch.randint(0, SETTINGS.top_k, (3, SETTINGS.levels))
    rows.set(torch.tensor([4, 5, 9]), path, 10)
    query_table, key_table = word_tables(SETTINGS.top_k, torch.float32, CPU)
    width = rows.num_channels
    assert width == 4 * SETTINGS.levels
    for buffer, table in ((query, query_table), (key, key_table)):
        assert torch.equal(_channels(buffer)[[4, 5, 9], :width], encode(path, table))
        assert int(_channels(buffer).any(-1).sum()) == 3
    rows.set(torch.tensor([0]), path[:1], 1)
    assert int(_channels(key).any(-1).sum()) == 1
    assert not _channels(value).any()
    rows.clear()
    assert not any(_channels(buffer).any() for buffer in (query, key))


def test_the_drafts_codes_are_cleared_too() -> None:
    rows = CodeRows(SETTINGS, 32, torch.float32, CPU)
    query, key = rows.query(QUERY), rows.key(KEY)
    rows.set_draft(torch.zeros(5, SETTINGS.levels, dtype=torch.int64))
    assert int(_channels(query).any(-1).sum()) == 5
    assert int(_channels(key).any(-1).sum()) == 5
    rows.clear()
    assert not _channels(query).any()
    assert not _channels(key).any()


def test_layers_of_a_shape_share_buffers() -> None:
    rows = CodeRows(SETTINGS, 32, torch.float32, CPU)
    assert rows.query(QUERY) is rows.query(QUERY)
    assert rows.key(KEY) is not rows.query(KEY)
    tables = rows.query_table.nbytes + rows.key_table.nbytes
    assert rows.num_bytes == 4 * 32 * 19 * (4 + 2 + 2) + tables


def test_rows_are_padded() -> None:
    rows = CodeRows(SETTINGS, 32, torch.float32, CPU).plain("value", KEY)
    for count in (5, 5, 3):
        given = torch.randn(count, 2, 3)
        padded = rows.fill(given)
        assert padded.is_contiguous()
        assert torch.equal(padded[..., :3], given)
        assert not padded[..., 3:].any()

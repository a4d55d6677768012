"""What V2 records of growing trees can be replayed, and starts before keys have a place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.recorded_graph import RecordedGraph
from tests.unit.tree_speculators import LAYER, VOCAB, WIDTH, SmallTreeSpeculator
from vllm_vispec.engine.v2 import ViSpecSpeculator
from vllm_vispec.tree.grow import DraftTree
from vllm_vispec.tree.policies import POLICIES
from vllm_vispec.tree.settings import TreeSettings

NODES, REQUESTS, TOKENS = 12, 6, 64
TREES = [name for name in POLICIES if name != "chain"]


def _speculator(policy: str = "eagle2", **changes: Any) -> SmallTreeSpeculator:
    settings = TreeSettings(policy=policy, depth=3, top_k=4)
    sizes = {"nodes": NODES, "max_num_reqs": REQUESTS, "max_num_tokens": TOKENS} | changes
    return SmallTreeSpeculator(settings, **sizes)


def _fill(speculator: SmallTreeSpeculator, seed: int, slots: list[int], padded: int) -> None:
    """Leave in the buffers what a first pass over some requests leaves."""
    generator = torch.Generator().manual_seed(seed)
    count, width = len(slots), speculator._width
    speculator._root_hidden.normal_(generator=generator)
    positions = torch.randint(0, 60, (REQUESTS,), generator=generator)
    speculator.input_buffers.positions[:REQUESTS] = positions
    speculator.cache.normal_(generator=generator)
    speculator.rows[:] = torch.randperm(TOKENS, generator=generator)
    speculator.idx_mapping[:] = -1
    speculator.idx_mapping[:count] = torch.tensor(slots)
    speculator.block_tables.gather_block_tables(speculator.idx_mapping, count)
    starts = torch.arange(REQUESTS + 1) * width
    speculator.input_buffers.query_start_loc[:] = starts.clamp(max=count * width)
    assert padded >= count


def _outcome(speculator: SmallTreeSpeculator, count: int) -> tuple[DraftTree, torch.Tensor]:
    slots = speculator.idx_mapping[:count]
    tree = speculator.table.read(slots, speculator.draft_tokens[:count])
    rows = (rows.clone() for rows in tree)
    return DraftTree(*rows), speculator.cache.clone()


def _static(speculator: SmallTreeSpeculator, num_rows: int) -> Any:
    slots = {LAYER: speculator.block_tables.slot_mappings[0, :num_rows]}
    return {LAYER: speculator.input_buffers}, slots


@pytest.mark.parametrize("policy", TREES)
def test_replays_grow_what_the_eager_passes_grow(policy: str) -> None:
    """One recording of four requests serves batches of four and of three, at other places."""
    speculator = _speculator(policy)
    speculator.place_keys()
    padded = 4
    num_rows = padded * speculator._width
    graph = RecordedGraph()
    speculator.idx_mapping.fill_(-1)
    with torch.inference_mode():
        metadata, slots = _static(speculator, num_rows)
        speculator._grow(padded, num_rows, metadata, slots)
        with graph:
            speculator._grow(padded, num_rows, metadata, slots)
        shapes = set()
        for seed, batch in enumerate(([0, 1, 2, 3], [5, 2, 4], [3, 5, 0, 1], [4])):
            found = []
            for run in (graph.replay, None):
                _fill(speculator, seed, batch, padded)
                if run is not None:
                    run()
                else:
                    count = len(batch)
                    num = count * speculator._width
                    bound = torch.full((count,), 64, dtype=torch.int32)
                    speculator._grow(count, num, None, slots, seq_lens_cpu_upper_bound=bound)
                found.append(_outcome(speculator, len(batch)))
                assert not speculator.query.rows[..., 8:].any()
                assert not speculator.key.rows[..., 8:].any()
            (replayed, replayed_cache), (eager, eager_cache) = found
            for mine, theirs in zip(replayed, eager, strict=True):
                assert torch.equal(mine, theirs)
            # The last row takes what is stored nowhere.
            assert torch.allclose(replayed_cache[:-1], eager_cache[:-1], atol=1e-6)
            shapes.add(str(replayed.parent.tolist()))
    assert len(shapes) == 4


def test_a_recording_refuses_what_a_graph_cannot_hold() -> None:
    rows = torch.arange(5)
    for reads in (
        lambda: rows.sum().item(),
        lambda: rows[rows > 2],
        lambda: rows + torch.tensor([1, 2, 3, 4, 5]),
        lambda: rows.nonzero(),
    ):
        with pytest.raises(AssertionError, match="cannot be part"), RecordedGraph():
            reads()


def test_empty_batches_touch_no_request() -> None:
    """What is grown while graphs are recorded belongs to nobody."""
    speculator = _speculator()
    speculator.place_keys()
    before = [rows[:-1].clone() for rows in (speculator.table.path, speculator.table.is_node)]
    cache = speculator.cache[:-1].clone()
    speculator.idx_mapping.fill_(-1)
    num_rows = REQUESTS * speculator._width
    speculator._grow(REQUESTS, num_rows, *_static(speculator, num_rows))
    for old, rows in zip(before, (speculator.table.path, speculator.table.is_node), strict=True):
        assert torch.equal(old, rows[:-1])
    assert torch.equal(cache, speculator.cache[:-1])


def _dummy_batch(num_requests: int) -> Any:
    return SimpleNamespace(
        num_reqs=num_requests,
        input_ids=torch.zeros(TOKENS, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.full((num_requests,), 8, dtype=torch.int32),
        req_ids=[f"dummy-{i}" for i in range(num_requests)],
        idx_mapping=torch.arange(num_requests),
    )


def _propose(speculator: SmallTreeSpeculator, batch: Any, **kwargs: Any) -> torch.Tensor:
    hidden = torch.zeros(TOKENS, WIDTH)
    return speculator.propose(batch, None, {}, hidden, dummy_run=True, **kwargs)


def test_the_memory_profile_grows_the_largest_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM profiles before `set_attn`: no keys, no slots, no trees, but every pass and buffer."""

    def first_pass(self: Any, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.draft_tokens[: batch.num_reqs]

    monkeypatch.setattr(ViSpecSpeculator, "propose", first_pass)
    speculator = _speculator()
    drafts = _propose(speculator, _dummy_batch(REQUESTS), is_profile=True)
    num_rows = REQUESTS * speculator._width
    assert speculator.passes == [(num_rows, False, False)] * 3
    assert drafts.shape == (REQUESTS, NODES)
    assert 0 <= int(drafts.min()) <= int(drafts.max()) < VOCAB
    # As many requests as a pass takes, where that is less than the largest batch.
    small = _speculator(max_num_tokens=TOKENS // 4)
    _propose(small, _dummy_batch(REQUESTS), is_profile=True)
    assert small.passes == [(TOKENS // 4, False, False)] * 3
    # Other dummy batches drafted nothing, and do not now.
    speculator.passes.clear()
    _propose(speculator, _dummy_batch(2))
    assert speculator.passes == []

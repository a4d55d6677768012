"""What V2 records of growing trees can be replayed, and starts before keys have a place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import cudagraph_utils

from tests.support.operators import RecordedGraph
from tests.support.tree_models import grow, random_model
from tests.support.tree_speculators import (
    LAYER,
    VOCAB,
    WIDTH,
    SmallPublishedTreeSpeculator,
    SmallTreeSpeculator,
)
from vllm_vispec.spec_decode.speculator import ViSpecSpeculator
from vllm_vispec.trees import limits
from vllm_vispec.trees.cudagraph import log_growth, why_eager
from vllm_vispec.trees.grow import DraftTree
from vllm_vispec.trees.policies import POLICIES
from vllm_vispec.trees.settings import Policy, TreeSettings
from vllm_vispec.trees.verify import TreeBatch

NODES, REQUESTS, TOKENS = 12, 6, 64
TREES = [name for name in POLICIES if name != "chain"]


def _speculator(
    policy: Policy = "eagle2", *, has_roots: bool = False, **changes: Any
) -> SmallTreeSpeculator:
    """Return a speculator; with roots behind the first pass, as published models have."""
    settings = TreeSettings(policy=policy, depth=3, top_k=4)
    sizes = {"nodes": NODES, "max_num_reqs": REQUESTS, "max_num_tokens": TOKENS} | changes
    make = SmallPublishedTreeSpeculator if has_roots else SmallTreeSpeculator
    return make(settings, *sizes.values())


def _fill(speculator: SmallTreeSpeculator, seed: int, slots: list[int]) -> None:
    """Leave in the buffers what a first pass over some requests leaves."""
    generator = torch.Generator().manual_seed(seed)
    count, width = len(slots), speculator._width
    speculator._root_hidden.normal_(generator=generator)
    if speculator.root_tokens is not None:
        speculator.root_tokens.random_(VOCAB, generator=generator)
    positions = torch.randint(0, 60, (REQUESTS,), generator=generator)
    speculator.input_buffers.positions[:REQUESTS] = positions
    speculator.cache.normal_(generator=generator)
    speculator.rows[:] = torch.randperm(speculator.max_num_tokens, generator=generator)
    speculator.idx_mapping[:] = -1
    speculator.idx_mapping[:count] = torch.tensor(slots)
    speculator.block_tables.gather_block_tables(speculator.idx_mapping, count)
    starts = torch.arange(REQUESTS + 1) * width
    speculator.input_buffers.query_start_loc[:] = starts.clamp(max=count * width)


def _outcome(speculator: SmallTreeSpeculator, count: int) -> tuple[DraftTree, torch.Tensor]:
    slots = speculator.idx_mapping[:count]
    tree = speculator.table.read_trees(slots, speculator.draft_tokens[:count, -NODES:])
    rows = (rows.clone() for rows in tree)
    return DraftTree(*rows), speculator.cache.clone()


def _static(speculator: SmallTreeSpeculator, num_rows: int) -> Any:
    slots = {LAYER: speculator.block_tables.slot_mappings[0, :num_rows]}
    return {LAYER: speculator.input_buffers}, slots


@pytest.mark.parametrize(
    ("policy", "has_roots"), [*((policy, False) for policy in TREES), ("eagle2", True)]
)
def test_replays_grow_what_the_eager_passes_grow(policy: Policy, has_roots: bool) -> None:
    """One recording of four requests serves batches of four and of three, at other places."""
    speculator = _speculator(policy, has_roots=has_roots)
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
                _fill(speculator, seed, batch)
                if run is not None:
                    run()
                else:
                    count = len(batch)
                    num = count * speculator._width
                    eager: Any = None, torch.full((count,), 64, dtype=torch.int32)
                    speculator._grow(count, num, None, slots, eager=eager)
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


@pytest.mark.parametrize("has_roots", [False, True])
def test_the_memory_profile_grows_the_largest_trees(
    monkeypatch: pytest.MonkeyPatch, has_roots: bool
) -> None:
    """vLLM profiles before `set_attn`: no keys, no slots, no trees, but every pass and buffer."""

    def first_pass(self: Any, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.draft_tokens[: batch.num_reqs]

    monkeypatch.setattr(ViSpecSpeculator, "propose", first_pass)
    speculator = _speculator(has_roots=has_roots)
    drafts = _propose(speculator, _dummy_batch(REQUESTS), is_profile=True)
    num_rows, num_passes = REQUESTS * speculator._width, 3 + has_roots
    assert speculator.passes == [(num_rows, False, False)] * num_passes
    assert drafts.shape == (REQUESTS, NODES)
    assert 0 <= int(drafts.min()) <= int(drafts.max()) < VOCAB
    # As many requests as a pass takes, where that is less than the largest batch.
    small = _speculator(max_num_tokens=TOKENS // 4, has_roots=has_roots)
    _propose(small, _dummy_batch(REQUESTS), is_profile=True)
    assert small.passes == [(TOKENS // 4, False, False)] * num_passes
    # Other dummy batches drafted nothing, and do not now.
    speculator.passes.clear()
    _propose(speculator, _dummy_batch(2))
    assert speculator.passes == []


def test_a_root_behind_the_first_pass_is_the_next_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pass has its token at its position and slot, and sees no more than that."""
    speculator = _speculator(has_roots=True)
    speculator.place_keys()
    seen: list[Any] = []
    run_model, batch = speculator._run_model, [2, 5]

    def spy(*args: Any) -> Any:
        buffers, width = speculator.input_buffers, speculator._width
        slots = speculator.block_tables.slot_mappings[0, : 2 * width]
        rows = buffers.input_ids, buffers.positions, slots
        seen.append([row[: 2 * width : width].tolist() for row in rows])
        seen[-1].append(buffers.seq_lens[:2].tolist())
        return run_model(*args)

    monkeypatch.setattr(speculator, "_run_model", spy)
    _fill(speculator, 0, batch)
    last_R = speculator.input_buffers.positions[:2].clone()
    num_rows, eager = 2 * speculator._width, torch.full((2,), 64, dtype=torch.int32)
    assert speculator.root_tokens is not None
    desc: Any = None
    speculator._grow(2, num_rows, None, _static(speculator, num_rows)[1], eager=(desc, eager))
    (tokens, positions, slots, lens), first = seen[0], seen[1]
    assert tokens == speculator.root_tokens[:2].tolist()
    assert positions == (last_R + 1).tolist()
    tables = speculator.block_tables.tables[batch]
    places = (last_R + 1) // 4, (last_R + 1) % 4
    assert slots == (tables[torch.arange(2), places[0]] * 4 + places[1]).tolist()
    # The copies behind the root lie in the next level's slots.
    assert lens == (last_R + 1 + speculator._width).tolist()
    assert first[1] == (last_R + 2).tolist()
    assert first[3] == (last_R + 2 + speculator._width).tolist()
    assert len(seen) == 4


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM's managers record on the CPU."""

    def capture(manager: Any, create_forward_fn: Any, progress_bar_desc: str = "") -> None:
        for mode in (CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL):
            for desc in manager._capture_descs.get(mode, []):
                create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
                if mode == CUDAGraphMode.FULL:
                    forward = create_forward_fn(desc, warmup=False)
                    with RecordedGraph() as manager.graphs[desc]:
                        forward(CUDAGraphMode.NONE)
        manager._graphs_captured = True

    monkeypatch.setattr(cudagraph_utils.CudaGraphManager, "capture", capture)
    group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: group)
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "current_platform", platform)


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "ViSpec trees grow" in text]


@pytest.mark.usefixtures("stand_in")
def test_batches_replay_the_graph_of_the_next_size(caplog: pytest.LogCaptureFixture) -> None:
    """Recorded and found by vLLM's managers; more requests than are recorded grow eagerly."""
    log_growth.cache_clear()
    caplog.set_level("INFO", "vllm")
    recorded, eager = _speculator(), _speculator()
    for speculator in (recorded, eager):
        speculator.place_keys()
    # Sizes of up to 20 tokens hold up to five trees' levels.
    recorded.vllm_config.compilation_config.cudagraph_capture_sizes = [4, 8, 16, 20]
    recorded.vllm_config.compilation_config.max_cudagraph_capture_size = 20
    with torch.inference_mode():
        recorded.init_cudagraph_manager(CUDAGraphMode.FULL_AND_PIECEWISE)
        recorded.capture()
        eager.init_cudagraph_manager(CUDAGraphMode.NONE)
        assert _said(caplog) == [
            "ViSpec trees grow in one CUDA graph for up to 5 requests in a step; steps with more "
            "run eagerly, max_cudagraph_capture_size sets the limit",
            "ViSpec trees grow eagerly, kernel by kernel: cudagraph_mode=NONE has no full graphs "
            "for decoding",
        ]
        manager = recorded.tree_cudagraph_manager
        assert manager is not None
        assert sorted(desc.num_reqs for desc in manager.graphs) == [1, 2, 4, 5]
        for seed, batch in enumerate(([2], [0, 4, 1], [5, 3, 1, 0], [3, 1, 2, 0, 5, 4])):
            found = []
            for speculator in (recorded, eager):
                _fill(speculator, seed, batch)
                speculator.passes.clear()
                speculator._grow_batch(_dummy_batch(len(batch)), is_profile=False)
                found.append(_outcome(speculator, len(batch))[0])
            assert len(eager.passes) == 3
            assert len(recorded.passes) == (3 if len(batch) > 5 else 0)
            for mine, theirs in zip(*found, strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("longest", "is_recorded"), [(None, True), (4, True), (3, False)])
def test_levels_that_a_backend_takes_for_prefills_are_not_recorded(
    longest: int | None, is_recorded: bool
) -> None:
    """FlashInfer does with levels wider than the target's requests, on some GPUs."""
    speculator = _speculator()
    speculator.place_keys()
    builder = SimpleNamespace(reorder_batch_threshold=longest)
    backend = SimpleNamespace(get_name=lambda: "SOME")
    group = SimpleNamespace(get_metadata_builder=lambda: builder, backend=backend)
    speculator.attn_groups = [[group]]
    reason = why_eager(speculator, speculator._width, CUDAGraphMode.FULL_AND_PIECEWISE)
    said = (
        "SOME records no requests of more than 3 tokens, a level of a tree has 4; "
        "num_speculative_tokens=3 is enough"
    )
    assert reason == (None if is_recorded else said)


@pytest.mark.usefixtures("stand_in")
def test_requests_for_which_a_pass_has_no_room_get_no_tree(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others' trees are those of a pass with room for all, and the log says so once."""
    monkeypatch.setattr(limits.logger, "propagate", True)
    caplog.set_level("INFO", limits.logger.name)
    limits.note_requests_without_tree.cache_clear()
    found, batch = [], [3, 1, 2, 0, 5, 4]
    slots = torch.tensor(batch)
    for num_tokens in (TOKENS, 4 * 4 + 1):
        speculator = _speculator(max_num_tokens=num_tokens)
        speculator.place_keys()
        speculator.init_cudagraph_manager(CUDAGraphMode.NONE)
        _fill(speculator, 1, batch)
        speculator.rows[:REQUESTS] = torch.arange(10, 10 + REQUESTS)
        dummy = _dummy_batch(REQUESTS)
        dummy.idx_mapping = slots
        speculator._grow_batch(dummy, is_profile=False)
        found.append(speculator.table.read_trees(slots, speculator.draft_tokens))
    for wide, narrow in zip(*found, strict=True):
        assert torch.equal(wide[:4], narrow[:4])
    assert not found[1].token[4:].clamp(min=0).any()
    assert torch.equal(speculator.table.depth[slots[4:]], torch.arange(NODES + 1).expand(2, -1))
    speculator._grow_batch(dummy, is_profile=False)
    (said,) = [text for text in caplog.messages if "got no tree" in text]
    assert f"max_num_seqs * {speculator._width} " in said


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("has_roots", [False, True])
@pytest.mark.parametrize("schedule", [None, [[1, 2, 12], [3, 4, 3], [5, 6, 1]]])
def test_chains_as_long_as_trees_are_not_recorded(
    schedule: list[list[int]] | None, has_roots: bool
) -> None:
    """Of 12 draft tokens vLLM would record chains, which are never drafted; of 3 they are.

    With a root behind the first pass a chain has one step more: of 4 steps, and of 2.
    """
    speculator = _speculator(has_roots=has_roots)
    speculator.place_keys()
    speculator._schedules_chains = schedule is not None
    speculator.speculative_config.num_speculative_tokens_per_batch_size = schedule
    steps: list[int] = []
    chains: Any = speculator
    chains._generate_fused_drafts = lambda *args, num_speculative_steps: steps.append(
        num_speculative_steps
    )
    with torch.inference_mode():
        speculator.init_cudagraph_manager(CUDAGraphMode.FULL_AND_PIECEWISE)
        speculator.capture()
    manager, trees = speculator.decode_cudagraph_manager, speculator.tree_cudagraph_manager
    assert manager is not None
    assert trees is not None
    recorded = {desc.num_speculative_tokens for desc in manager.graphs}
    wanted = {4, 2} if has_roots else {3}
    assert recorded == set(steps) == (set() if schedule is None else wanted)
    assert {desc.uniform_token_count for desc in trees.graphs} == {speculator._width}


@pytest.mark.usefixtures("stand_in")
def test_batches_replay_the_verification_of_the_next_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged batches of one to six requests find what is found eagerly, after a sleep too."""
    settings, num_rows = TreeSettings(depth=3, top_k=4), REQUESTS * (NODES + 1)
    speculator = _speculator(max_num_tokens=2 * num_rows)
    speculator.place_keys()
    speculator.init_cudagraph_manager(CUDAGraphMode.FULL_AND_PIECEWISE)
    speculator.capture()
    manager = speculator.verification_cudagraph_manager
    assert manager is not None
    assert sorted(desc.num_reqs for desc in manager.graphs) == [1, 2, 4]
    recorded = speculator.model_state.recorded_verification
    replayed: list[int] = []
    run = manager.run_fullgraph

    def run_fullgraph(desc: Any) -> None:
        replayed.append(desc.num_reqs)
        run(desc)

    monkeypatch.setattr(manager, "run_fullgraph", run_fullgraph)
    speculator.table.write_trees(slice(REQUESTS), grow(random_model(5), settings, REQUESTS, NODES))
    # What memory holds after a sleep of level 2, in which vLLM keeps buffers of models alone.
    for rows in (
        *(recorded._sampled, recorded._token),
        *(recorded._slot, recorded._start, recorded._count),
    ):
        rows.fill_(10**9)
    accepted = set()
    for seed, count in enumerate((1, 3, 4, 2, 6, 3, 1, 4)):
        generator = torch.Generator().manual_seed(seed)
        count_R = torch.randint(0, NODES + 1, (count,), generator=generator)
        starts = F.pad((count_R + 1).cumsum(0), (1, 0))
        num_rows = int((count_R + 1).sum())
        slot_R = torch.randperm(REQUESTS, generator=generator)[:count]
        # Few tokens: the target agrees with many nodes.
        sampled_S, token_S = torch.randint(2, (2, num_rows), generator=generator)
        index_S = torch.arange(num_rows)
        batch = TreeBatch(speculator.table, slot_R, starts, index_S, num_rows)
        found, moves = recorded.verify(batch, sampled_S, token_S)
        expected, expected_moves = batch.verify(sampled_S, token_S)
        for mine, theirs in zip((*found, *moves), (*expected, *expected_moves), strict=True):
            assert torch.equal(mine, theirs)
        accepted.update(found.num_accepted.tolist())
    assert replayed == [1, 4, 4, 2, 4, 1, 4]
    assert len(accepted) > 1

"""How many kernels a step with trees launches by itself on V2, and what of it a graph can hold.

Counted are the operators of ours that run one by one in every step: codes and positions before the
target's pass, the walk behind vLLM's sampling, the accepted path's move, and what is told to the
graph in which trees grow.  Views launch nothing.  Left out are vLLM's own operators, and what is
recorded in a graph: the growth of the trees with all draft passes, the walk where that is recorded,
and the copies in which layers pad their rows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS

from tests.support.operators import RecordedGraph
from tests.support.tree_models import grow, random_model
from tests.support.tree_speculators import SmallTreeSpeculator
from vllm_vispec.spec_decode.row_table import RowTable
from vllm_vispec.spec_decode.step import RowIds
from vllm_vispec.trees import rejection_sampler as v2_sampler
from vllm_vispec.trees import speculator as v2
from vllm_vispec.trees.code_rows import CodeRows
from vllm_vispec.trees.model_state import StateTrees
from vllm_vispec.trees.rejection_sampler import TreeRejectionSampler
from vllm_vispec.trees.rounds import TreeRound, TreeTable
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.trees.target_cache import TargetCache
from vllm_vispec.trees.walk_graph import StaticWalk

CPU = torch.device("cpu")
SETTINGS, NODES, REQUESTS, VOCAB, WIDTH = TreeSettings(depth=3, top_k=8), 29, 3, 40, 16
ROWS = REQUESTS * (NODES + 1)
LAYERS, BLOCKS, SLOTS = 28, 64, 16
TARGET_HEADS, DRAFT_HEADS = (2, 8, 32), (2, 9, 40)
# 105 and 72 as this is written.
EAGER_BUDGET, BUDGET = 120, 85
_NO_KERNEL = (
    "view",
    "slice",
    "select.int",
    "expand",
    "squeeze",
    "transpose",
    "permute",
    "alias",
    "detach",
    "as_strided",
    "unbind",
    "split",
    "reshape",
    "empty",
    "lift_fresh",
)


class Launches(TorchDispatchMode):
    """Counts operators that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not any(plain in name for plain in _NO_KERNEL):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Step:
    """What one step of a V2 runner does with trees, in vLLM's order."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        codes = CodeRows(SETTINGS, 2 * ROWS, torch.float32, CPU)
        for heads in (TARGET_HEADS, DRAFT_HEADS):
            codes.query(heads)
            codes.key(heads)
        self.table = TreeTable(SETTINGS, NODES, REQUESTS, CPU)
        self.table.write(slice(REQUESTS), grow(random_model(3), SETTINGS, REQUESTS, NODES))
        self.trees = _state_trees(codes, self.table)
        starts = torch.arange(REQUESTS + 1, dtype=torch.int32) * (NODES + 1)
        self.batch = SimpleNamespace(
            num_reqs=REQUESTS,
            num_draft_tokens=REQUESTS * NODES,
            num_tokens=ROWS,
            logits_indices=torch.arange(ROWS, dtype=torch.int32),
            cu_num_logits=starts,
            idx_mapping=torch.arange(REQUESTS, dtype=torch.int32),
            positions=torch.arange(ROWS),
            seq_lens_cpu_upper_bound=torch.full((REQUESTS,), 40, dtype=torch.int32),
            req_ids=["a", "b", "c"],
        )
        self.layer_slots = torch.arange(ROWS) + SLOTS
        self.speculator = _speculator()

    def run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Count each part of a step."""
        trees, batch = self.trees, self.batch
        self._count("before the target", lambda: trees._begin_pass(lambda *args: {}, batch, None))
        sampler = _sampler(trees, torch.randint(VOCAB, (ROWS,)), monkeypatch)
        logits, token = torch.randn(ROWS, VOCAB), torch.zeros(ROWS, dtype=torch.int64)
        self._count("before the samples", trees.end_pass)
        self._count("the walk", lambda: self.verify(sampler, logits, token))
        ids, hidden = torch.zeros(ROWS, dtype=torch.int32), torch.zeros(ROWS, WIDTH)
        slots = {f"layer {number}": self.layer_slots for number in range(LAYERS)}
        self._count("the move", lambda: trees.accept(ids, hidden, slots))
        self._count(
            "around the graph", lambda: self.speculator._grow_batch(batch, is_profile=False)
        )

    def verify(
        self, sampler: TreeRejectionSampler, logits: torch.Tensor, token: torch.Tensor
    ) -> None:
        """Walk down the trees whose nodes have these tokens."""
        starts, slots, rows = self.batch.cu_num_logits, self.batch.idx_mapping, torch.arange(ROWS)
        nothing: Any = None
        sampler._verify(
            logits,
            None,
            token,
            rows,
            starts,
            slots,
            slots.numpy(),
            nothing,
            nothing,
            nothing,
            token,
        )

    def _count(self, label: str, call: Callable[[], Any]) -> None:
        with Launches() as launches:
            call()
        self.counts[label] = len(launches.names)


def _state_trees(codes: CodeRows, table: TreeTable) -> StateTrees:
    trees = object.__new__(StateTrees)
    trees.codes, trees.table = codes, table
    trees.static_walk = StaticWalk(table, REQUESTS, 2 * ROWS)
    trees._round, trees._positions, trees._moves, trees._needs_chain = None, None, [], {}
    num_heads, head_size, padded_size = TARGET_HEADS
    caches = torch.randn(LAYERS, BLOCKS, num_heads, SLOTS, 2 * padded_size)
    padding = SimpleNamespace(key_shape=TARGET_HEADS, head_size=head_size, padded_size=padded_size)

    def store_padded(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
        cache.transpose(1, 2)[slots // SLOTS, slots % SLOTS] = torch.cat((key, value), -1)

    impl = SimpleNamespace(tree_padding=padding, store_padded=store_padded)
    trees.cache = TargetCache(
        [
            SimpleNamespace(
                layer_name=f"layer {number}",
                kv_cache=caches[number],
                impl=impl,
                attn_backend=SimpleNamespace(get_name=lambda: "SOME"),
            )
            for number in range(LAYERS)
        ]
    )
    return trees


def _sampler(
    trees: StateTrees,
    sampled: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    *,
    num_logprobs: int = NO_LOGPROBS,
    has_mask: bool = False,
) -> TreeRejectionSampler:
    """Return the sampler without vLLM's own operators."""
    monkeypatch.setattr(v2_sampler, "gumbel_sample", lambda *args, **kwargs: sampled)
    states = SimpleNamespace(
        temperature=SimpleNamespace(gpu=None),
        seeds=SimpleNamespace(gpu=None),
        max_num_logprobs=lambda slots: num_logprobs,
    )
    sampler = object.__new__(TreeRejectionSampler)
    sampler.trees, sampler._first_row = trees, 0
    sampler.num_speculative_steps = NODES
    own: Any = SimpleNamespace(
        apply_sampling_params=lambda logits, *args: logits,
        sampling_states=states,
        return_sampling_mask=has_mask,
        use_fp64_gumbel=False,
    )
    sampler.sampler = own
    return sampler


def _speculator() -> SmallTreeSpeculator:
    speculator = SmallTreeSpeculator(SETTINGS, NODES, REQUESTS, 2 * ROWS)
    speculator.place_keys()
    table = RowTable(RowIds(2, 4), WIDTH, 2 * ROWS)
    speculator.draft_rows = SimpleNamespace(select_rows=table.select_rows)
    return speculator


@pytest.mark.parametrize("has_walk", [False, True], ids=["eager walk", "recorded walk"])
def test_a_step_launches_few_kernels(has_walk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step()
    graph = SimpleNamespace(cg_mode=CUDAGraphMode.FULL)
    replayed: list[Any] = []
    monkeypatch.setattr(v2, "dispatch_cg_and_sync_dp", lambda *args, **kwargs: (graph, None))
    monkeypatch.setattr(v2.TreeSpeculator, "_replay", lambda self, desc: replayed.append(desc))
    if has_walk:
        manager: Any = SimpleNamespace(
            dispatch=lambda *args, **kwargs: graph, run_fullgraph=lambda desc: None
        )
        step.trees.static_walk.find_manager = lambda: manager
    # The first step looks at the caches from the host.
    step.run(monkeypatch)
    step.run(monkeypatch)
    assert replayed == [graph, graph]
    assert sum(step.counts.values()) <= (BUDGET if has_walk else EAGER_BUDGET), step.counts
    # Nothing is left out by mistake.
    assert all(count > 0 for count in step.counts.values()), step.counts


@pytest.mark.parametrize(
    ("num_logprobs", "has_mask", "is_moved"),
    [(NO_LOGPROBS, False, False), (0, False, True), (NO_LOGPROBS, True, True)],
    ids=["nobody reads them", "logprobs", "sampling mask"],
)
def test_rows_of_logits_move_only_where_they_are_read(
    num_logprobs: int, has_mask: bool, is_moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step()
    step.trees._begin_pass(lambda *args: {}, step.batch, None)
    # Every request accepts the second child of its root, and nothing below it.
    token = torch.arange(ROWS)
    first = torch.arange(REQUESTS) * (NODES + 1)
    depths_RJ = step.table.depth[:REQUESTS]
    second = first + torch.stack([(depth_J == 1).nonzero()[1, 0] for depth_J in depths_RJ])
    assert not torch.equal(second, first + 1)
    sampled = torch.full((ROWS,), ROWS)
    sampled[first] = second
    sampler = _sampler(
        step.trees, sampled, monkeypatch, num_logprobs=num_logprobs, has_mask=has_mask
    )
    logits = torch.randn(ROWS, VOCAB)
    expected = logits.clone()
    if is_moved:
        expected[first + 1] = logits[second]
    step.verify(sampler, logits, token)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("counts", [(NODES, NODES, NODES), (NODES, 7, 0)])
def test_a_walk_can_be_recorded(counts: tuple[int, ...]) -> None:
    """Replayed on other samples, trees and slots it finds what it finds when run anew."""
    table = TreeTable(SETTINGS, NODES, 5, CPU)
    table.write(slice(5), grow(random_model(5), SETTINGS, 5, NODES))
    count_R = torch.tensor(counts)
    start_R = (count_R + 1).cumsum(0) - count_R - 1
    num_rows = int((count_R + 1).sum())
    slot_R = torch.arange(3)
    sampled_S, token_S = torch.zeros(2, num_rows, dtype=torch.int64)
    index_S = torch.arange(num_rows)

    def find() -> list[torch.Tensor]:
        batch = TreeRound(table, slot_R, start_R, count_R, index_S, num_rows)
        found = batch.walk(sampled_S, token_S)
        return [*found, *batch.moves(found)]

    with RecordedGraph() as graph:
        recorded = find()
    accepted = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        slot_R.copy_(torch.randperm(5, generator=generator)[:3])
        # Few tokens: the target agrees with many nodes.
        sampled_S.random_(3, generator=generator)
        token_S.random_(3, generator=generator)
        graph.replay()
        for replayed, expected in zip(recorded, find(), strict=True):
            assert torch.equal(replayed, expected)
        accepted.update(recorded[1].tolist())
    assert len(accepted) > 2

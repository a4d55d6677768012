"""What a step with trees runs by itself on V2: few kernels, none of which waits for the device.

Counted are the operators of ours that run one by one in every step: codes and positions before the
target's pass, verification behind vLLM's sampling, the accepted path's move, and what is told to
the graph in which trees grow.  Views launch nothing.  Left out are vLLM's own operators, and what
is recorded in a graph: the growth of the trees with all draft passes, verification where that is
recorded, and the copies in which layers pad their rows.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS

from tests.support.operators import Record
from tests.support.tree_models import grow, random_model
from tests.support.tree_speculators import SmallTreeSpeculator
from vllm_vispec.spec_decode.row_table import RowTable
from vllm_vispec.spec_decode.step import RowIds
from vllm_vispec.trees.codes import CodeBuffers
from vllm_vispec.trees.cudagraph import RecordedVerification
from vllm_vispec.trees.model_state import TreeRejectionSampler, tree_model_state
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.trees.target_cache import TargetCache
from vllm_vispec.trees.verify import EngineTrees, TreeTable

CPU = torch.device("cpu")
SETTINGS, NODES, REQUESTS, VOCAB, WIDTH = TreeSettings(depth=3, top_k=8), 29, 3, 40, 16
ROWS = REQUESTS * (NODES + 1)
LAYERS, BLOCKS, SLOTS = 28, 64, 16
TARGET_HEADS, DRAFT_HEADS = (2, 8, 32), (2, 9, 40)
# 106 and 72 as this is written.
EAGER_BUDGET, BUDGET = 120, 85
_NO_KERNEL = (
    *("view", "slice", "select.int", "expand", "squeeze", "transpose", "permute", "alias"),
    *("detach", "as_strided", "unbind", "split", "reshape", "empty", "lift_fresh"),
)


class Step:
    """What one step of a V2 runner does with trees, in vLLM's order."""

    def __init__(self) -> None:
        codes = CodeBuffers(SETTINGS.levels, SETTINGS.top_k, 2 * ROWS, torch.float32, CPU)
        for heads in (TARGET_HEADS, DRAFT_HEADS):
            codes.query_buffer(heads)
            codes.key_buffer(heads)
        table = TreeTable(SETTINGS.levels, NODES, REQUESTS, CPU)
        table.write_trees(slice(REQUESTS), grow(random_model(3), SETTINGS, REQUESTS, NODES))
        self.trees = EngineTrees(codes, table, _target_cache())
        self.recorded = RecordedVerification(table, REQUESTS, 2 * ROWS)
        plain = type("State", (), {"prepare_inputs": lambda *_: {}})
        self.state = object.__new__(tree_model_state(plain))
        self.state.trees = self.trees
        self.batch = SimpleNamespace(
            num_reqs=REQUESTS,
            num_draft_tokens=REQUESTS * NODES,
            num_tokens=ROWS,
            logits_indices=torch.arange(ROWS, dtype=torch.int32),
            cu_num_logits=torch.arange(REQUESTS + 1, dtype=torch.int32) * (NODES + 1),
            idx_mapping=torch.arange(REQUESTS, dtype=torch.int32),
            positions=torch.arange(ROWS),
            seq_lens_cpu_upper_bound=torch.full((REQUESTS,), 40, dtype=torch.int32),
            req_ids=["a", "b", "c"],
        )
        self.layer_slots = torch.arange(ROWS) + SLOTS
        self.speculator = SmallTreeSpeculator(SETTINGS, NODES, REQUESTS, 2 * ROWS)
        self.speculator.place_keys()
        rows = RowTable(RowIds(2, 4), WIDTH, 2 * ROWS)
        self.speculator.draft_rows = SimpleNamespace(select_rows=rows.select_rows)

    def run(self, record: Record) -> None:
        """Record each part of a step."""
        trees, batch = self.trees, self.batch
        sampler = self.sampler(torch.randint(VOCAB, (ROWS,)))
        logits, token = torch.randn(ROWS, VOCAB), torch.zeros(ROWS, dtype=torch.int64)
        ids, hidden = torch.zeros(ROWS, dtype=torch.int32), torch.zeros(ROWS, WIDTH)
        slots = {f"layer {number}": self.layer_slots for number in range(LAYERS)}
        with record.watching("before the target"):
            self.state.prepare_inputs(batch, None)
        with record.watching("before the samples"):
            trees.end_target_pass()
        with record.watching("verification"):
            self.verify(sampler, logits, token)
        with record.watching("the move"):
            trees.move_accepted(ids, hidden, slots)
        with record.watching("around the graph"):
            self.speculator._grow_batch(batch, is_profile=False)

    def verify(
        self, sampler: TreeRejectionSampler, logits: torch.Tensor, token: torch.Tensor
    ) -> None:
        """Verify the trees whose nodes have these tokens."""
        starts, slots, rows = self.batch.cu_num_logits, self.batch.idx_mapping, torch.arange(ROWS)
        given: list[Any] = [logits, None, token, rows, starts, slots, None]
        sampler._verify(*given, *[None] * 3, token)  # type: ignore[call-arg]

    def sampler(
        self, sampled: torch.Tensor, *, num_logprobs: int = NO_LOGPROBS, has_mask: bool = False
    ) -> TreeRejectionSampler:
        """Return the sampler without vLLM's own operators."""
        sampler = object.__new__(TreeRejectionSampler)
        sampler._trees, sampler._recorded, sampler._num_rows_done = self.trees, self.recorded, 0
        sampler.num_speculative_steps = NODES
        own: Any = SimpleNamespace(
            sample=lambda logits, *args, **kwargs: (sampled, logits),
            sampling_states=SimpleNamespace(max_num_logprobs=lambda slots: num_logprobs),
            return_sampling_mask=has_mask,
        )
        sampler.sampler = own
        return sampler


def _target_cache() -> TargetCache:
    num_heads, head_size, padded_size = TARGET_HEADS
    caches = torch.randn(LAYERS, BLOCKS, num_heads, SLOTS, 2 * padded_size)
    padding = SimpleNamespace(key_shape=TARGET_HEADS, head_size=head_size, padded_size=padded_size)

    def store_padded(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
        cache.transpose(1, 2)[slots // SLOTS, slots % SLOTS] = torch.cat((key, value), -1)

    impl = SimpleNamespace(tree_padding=padding, store_padded=store_padded)
    return TargetCache(
        [
            SimpleNamespace(layer_name=f"layer {number}", kv_cache=caches[number], impl=impl)
            for number in range(LAYERS)
        ]
    )


class _Manager:
    """A graph manager of vLLM's that has recorded all sizes, and replays nothing."""

    def __init__(self) -> None:
        self.graph = SimpleNamespace(cg_mode=CUDAGraphMode.FULL)
        self.replayed: list[Any] = []

    def dispatch(self, *args: Any, **kwargs: Any) -> Any:
        return self.graph

    def run_fullgraph(self, desc: Any) -> None:
        self.replayed.append(desc)


@pytest.mark.parametrize("is_recorded", [False, True], ids=["eager", "recorded verification"])
def test_a_step_launches_few_kernels(is_recorded: bool) -> None:
    """And the same ones in every step, whatever is accepted; the device is never waited for."""
    step = Step()
    growth: Any = _Manager()
    verification: Any = _Manager()
    step.speculator.tree_cudagraph_manager = growth
    if is_recorded:
        step.recorded.use_manager(verification)
    # The first step looks at the caches from the host.
    step.run(Record())
    record = Record()
    for _ in range(3):
        step.run(record)
    assert growth.replayed == [growth.graph] * 4
    # Lengths are on the host.
    assert [one for one in record.violations if "around the graph" not in one] == []
    counts = {}
    for part, passes in record.passes.items():
        assert all(operators == passes[0] for operators in passes), part
        names = [operator.split()[0] for operator in passes[0]]
        counts[part] = sum(not any(plain in name for plain in _NO_KERNEL) for name in names)
    assert sum(counts.values()) <= (BUDGET if is_recorded else EAGER_BUDGET), counts
    # Nothing is left out by mistake.
    assert all(count > 0 for count in counts.values()), counts


@pytest.mark.parametrize(
    ("num_logprobs", "has_mask", "is_moved"),
    [(NO_LOGPROBS, False, False), (0, False, True), (NO_LOGPROBS, True, True)],
    ids=["nobody reads them", "logprobs", "sampling mask"],
)
def test_rows_of_logits_move_only_where_they_are_read(
    num_logprobs: int, has_mask: bool, is_moved: bool
) -> None:
    step = Step()
    step.state.prepare_inputs(step.batch, None)
    # Every request accepts the second child of its root, and nothing below it.
    token = torch.arange(ROWS)
    first = torch.arange(REQUESTS) * (NODES + 1)
    depths_RJ = step.trees.table.depth[:REQUESTS]
    second = first + torch.stack([(depth_J == 1).nonzero()[1, 0] for depth_J in depths_RJ])
    assert not torch.equal(second, first + 1)
    sampled = torch.full((ROWS,), ROWS)
    sampled[first] = second
    sampler = step.sampler(sampled, num_logprobs=num_logprobs, has_mask=has_mask)
    logits = torch.randn(ROWS, VOCAB)
    expected = logits.clone()
    if is_moved:
        expected[first + 1] = logits[second]
    step.verify(sampler, logits, token)
    assert torch.equal(logits, expected)

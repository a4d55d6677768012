"""How many kernels a step with trees launches by itself on V2, and what of it a graph can hold.

Counted are the operators of ours that run one by one in every step: codes and positions before the
target's pass, verification behind vLLM's sampling, the accepted path's move, and what is told to
the graph in which trees grow.  Views launch nothing.  Left out are vLLM's own operators, and what
is recorded in a graph: the growth of the trees with all draft passes, verification where that is
recorded, and the copies in which layers pad their rows.
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
        codes = CodeBuffers(SETTINGS.levels, SETTINGS.top_k, 2 * ROWS, torch.float32, CPU)
        for heads in (TARGET_HEADS, DRAFT_HEADS):
            codes.query_buffer(heads)
            codes.key_buffer(heads)
        table = TreeTable(SETTINGS.levels, NODES, REQUESTS, CPU)
        table.write_trees(slice(REQUESTS), grow(random_model(3), SETTINGS, REQUESTS, NODES))
        self.trees = EngineTrees(codes, table, _target_cache())
        self.recorded = RecordedVerification(table, REQUESTS, 2 * ROWS)
        self.state = object.__new__(tree_model_state(_State))
        self.state.trees = self.trees
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

    def run(self) -> None:
        """Count each part of a step."""
        trees, batch = self.trees, self.batch
        self._count("before the target", lambda: self.state.prepare_inputs(batch, None))
        sampler = self.sampler(torch.randint(VOCAB, (ROWS,)))
        logits, token = torch.randn(ROWS, VOCAB), torch.zeros(ROWS, dtype=torch.int64)
        self._count("before the samples", trees.end_target_pass)
        self._count("verification", lambda: self.verify(sampler, logits, token))
        ids, hidden = torch.zeros(ROWS, dtype=torch.int32), torch.zeros(ROWS, WIDTH)
        slots = {f"layer {number}": self.layer_slots for number in range(LAYERS)}
        self._count("the move", lambda: trees.move_accepted(ids, hidden, slots))
        self._count(
            "around the graph", lambda: self.speculator._grow_batch(batch, is_profile=False)
        )

    def _count(self, label: str, call: Callable[[], Any]) -> None:
        with Launches() as launches:
            call()
        self.counts[label] = len(launches.names)

    def verify(
        self, sampler: TreeRejectionSampler, logits: torch.Tensor, token: torch.Tensor
    ) -> None:
        """Verify the trees whose nodes have these tokens."""
        starts, slots, rows = self.batch.cu_num_logits, self.batch.idx_mapping, torch.arange(ROWS)
        given: list[Any] = [logits, None, token, rows, starts, slots, slots.numpy()]
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


class _State:
    """vLLM's model state of a target with plain positions."""

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        return {}


def _target_cache() -> TargetCache:
    num_heads, head_size, padded_size = TARGET_HEADS
    caches = torch.randn(LAYERS, BLOCKS, num_heads, SLOTS, 2 * padded_size)
    padding = SimpleNamespace(key_shape=TARGET_HEADS, head_size=head_size, padded_size=padded_size)

    def store_padded(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
        cache.transpose(1, 2)[slots // SLOTS, slots % SLOTS] = torch.cat((key, value), -1)

    impl = SimpleNamespace(tree_padding=padding, store_padded=store_padded)
    return TargetCache(
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


def _speculator() -> SmallTreeSpeculator:
    speculator = SmallTreeSpeculator(SETTINGS, NODES, REQUESTS, 2 * ROWS)
    speculator.place_keys()
    table = RowTable(RowIds(2, 4), WIDTH, 2 * ROWS)
    speculator.draft_rows = SimpleNamespace(select_rows=table.select_rows)
    return speculator


@pytest.mark.parametrize("is_recorded", [False, True], ids=["eager", "recorded verification"])
def test_a_step_launches_few_kernels(is_recorded: bool) -> None:
    step = Step()
    graph = SimpleNamespace(cg_mode=CUDAGraphMode.FULL)
    manager: Any = _Manager(graph)
    verification: Any = _Manager(graph)
    step.speculator.tree_cudagraph_manager = manager
    if is_recorded:
        step.recorded.use_manager(verification)
    # The first step looks at the caches from the host.
    step.run()
    step.run()
    assert manager.replayed == [graph, graph]
    assert sum(step.counts.values()) <= (BUDGET if is_recorded else EAGER_BUDGET), step.counts
    # Nothing is left out by mistake.
    assert all(count > 0 for count in step.counts.values()), step.counts


class _Manager:
    """A graph manager of vLLM's that has recorded all sizes."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self.replayed: list[Any] = []

    def dispatch(self, *args: Any, **kwargs: Any) -> Any:
        return self._graph

    def run_fullgraph(self, desc: Any) -> None:
        """Replay nothing."""
        self.replayed.append(desc)


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

"""A speculative step of a draft tree: grown, verified and moved, eagerly and as a CUDA graph.

Shapes: R requests, V vocabulary, W nodes expanded in a pass, N nodes, S rows of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from tests.gpu.bare_attention import milliseconds
from tests.gpu.setup import TREE, NotRun, Setup
from vllm_vispec.trees.grow import DraftTree, TreeGrower, best_path, replace_rows
from vllm_vispec.trees.verify import Moves, TreeBatch, TreeTable

NODES = 29
VOCAB = 152_064  # Qwen2.5-VL's
NUM_STEPS = 8
DTYPE = torch.bfloat16
_Result = TypeVar("_Result")


class Inputs(NamedTuple):
    """What differs from step to step.

    Attributes:
        root: The draft's logits behind the roots, ``[R, V]``.
        levels: Its logits of each level's pass, ``[depth, R, W, V]``.
        sampled: int64 ``[S]``; the target's token behind each row.
        is_linear: bool ``[R, 1]``; which requests get a chain.
        slot: int64 ``[R]``.
    """

    root: torch.Tensor
    levels: torch.Tensor
    sampled: torch.Tensor
    is_linear: torch.Tensor
    slot: torch.Tensor


class Outputs(NamedTuple):
    """What a step leaves behind."""

    tree: DraftTree
    moves: Moves
    accepted: torch.Tensor
    emitted: torch.Tensor


def run_step(setup: Setup) -> Any:
    """Steps on the device equal those on the CPU, and none of them waits for the device."""
    num_requests = 16 if setup.on_gpu else 3
    table = _table(num_requests, setup.device)
    host_table = _table(num_requests, "cpu")
    num_accepted = 0
    for seed in range(NUM_STEPS):
        inputs = _inputs(num_requests, setup, seed)
        on_device = Inputs(*(part.to(setup.device) for part in inputs))
        with no_waiting(setup):
            found = step(on_device, table)
        expected = step(inputs, host_table)
        _require_equal(found, expected, f"step {seed}")
        num_accepted += int(expected.accepted.sum())
    # Else the walk was never asked to descend.
    assert num_accepted > num_requests, num_accepted
    return {"steps": NUM_STEPS, "requests": num_requests, "draft tokens accepted": num_accepted}


def run_graph(setup: Setup) -> Any:
    """A step recorded as a graph, replayed on other data, equals the eager one."""
    num_requests = 16 if setup.on_gpu else 3
    static = Inputs(
        *(part.to(setup.device).clone() for part in _inputs(num_requests, setup, seed=0))
    )
    table, eager_table = _table(num_requests, setup.device), _table(num_requests, setup.device)
    replay, outputs = record(lambda: step(static, table), setup)
    for seed in range(1, NUM_STEPS):
        inputs = Inputs(*(part.to(setup.device) for part in _inputs(num_requests, setup, seed)))
        for mine, given in zip(static, inputs, strict=True):
            mine.copy_(given)
        replay()
        _require_equal(outputs(), step(inputs, eager_table), f"replay {seed}")
    return {
        "recorded": setup.on_gpu,
        "eager ms": round(milliseconds(lambda: step(static, table), setup), 3),
        "replayed ms": round(milliseconds(replay, setup), 3),
    }


def run_memory(setup: Setup) -> Any:
    """Growing one level takes little beside the logits themselves."""
    if not setup.on_gpu:
        raise NotRun("peak memory is read from the CUDA allocator")
    found: dict[str, Any] = {}
    for num_requests in (8, 64, 273):
        grower = TreeGrower(TREE)
        root = torch.randn(num_requests, VOCAB, dtype=DTYPE, device="cuda")
        logits = torch.randn(num_requests, TREE.top_k, VOCAB, dtype=DTYPE, device="cuda")
        grower.start_trees(root)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grower.grow_level(logits)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        found[f"{num_requests} requests, MiB"] = {
            "logits": round(logits.nbytes / 2**20, 1),
            "on top": round(peak / 2**20, 1),
        }
        assert peak <= logits.nbytes, found
    return found


def step(inputs: Inputs, table: TreeTable) -> Outputs:
    """Grow trees, keep them, verify them as a batch of their own, and find what moves."""
    grower = TreeGrower(TREE)
    grower.start_trees(inputs.root)
    for logits_RWV in inputs.levels:
        grower.grow_level(logits_RWV)
    tree = grower.finish_trees(NODES)
    tree = replace_rows(tree, best_path(tree), inputs.is_linear)
    table.write_trees(inputs.slot, tree)
    num_requests, device = inputs.slot.shape[0], inputs.slot.device
    starts = torch.arange(num_requests + 1, device=device) * (NODES + 1)
    num_rows = num_requests * (NODES + 1)
    batch = TreeBatch(table, inputs.slot, starts, torch.arange(num_rows, device=device), num_rows)
    token_S = torch.nn.functional.pad(tree.token, (1, 0)).flatten()
    # The target agrees with the draft at two rows of three, else the walk ends at the root.
    row_S = torch.arange(num_rows, device=device)
    best_child_S = torch.roll(token_S, -1)
    sampled_S = torch.where(inputs.sampled % 3 > 0, best_child_S, row_S % VOCAB)
    found, moves = batch.verify(sampled_S, token_S)
    return Outputs(tree, moves, found.num_accepted, found.token)


def _inputs(num_requests: int, setup: Setup, seed: int) -> Inputs:
    """Return inputs on the CPU; in each row a few tokens stand out, and no scores are tied."""
    generator = torch.Generator().manual_seed(seed)
    size = VOCAB if setup.on_gpu else 1_000

    def logits(*shape: int) -> torch.Tensor:
        rows = torch.full((*shape, size), -20.0)
        first = torch.randint(size, (*shape, 1), generator=generator)
        token = (first + 7919 * torch.arange(12)) % size  # a prime: all different
        lower = torch.arange(12) / 2 + 0.4 * torch.rand(*shape, 12, generator=generator)
        return rows.scatter_(-1, token, 8 - lower).to(DTYPE)

    while True:
        inputs = Inputs(
            logits(num_requests),
            logits(TREE.depth, num_requests, TREE.top_k),
            torch.randint(size, (num_requests * (NODES + 1),), generator=generator),
            torch.rand(num_requests, 1, generator=generator) < 0.25,
            torch.randperm(num_requests, generator=generator),
        )
        if _is_stable(inputs, generator):
            return inputs


def _is_stable(inputs: Inputs, generator: torch.Generator) -> bool:
    """Whether trees stay the same if scores differ as much as two devices' rounding lets them."""
    shaken = inputs._replace(
        root=inputs.root + 2e-5 * torch.rand(inputs.root.shape, generator=generator),
        levels=inputs.levels + 2e-5 * torch.rand(inputs.levels.shape, generator=generator),
    )
    num_requests = inputs.slot.shape[0]
    trees = (step(part, _table(num_requests, "cpu")).tree for part in (inputs, shaken))
    return all(torch.equal(mine, theirs) for mine, theirs in zip(*trees, strict=True))


def _table(num_requests: int, device: str) -> TreeTable:
    return TreeTable(TREE.levels, NODES, num_requests, torch.device(device))


@contextmanager
def no_waiting(setup: Setup) -> Iterator[None]:
    """Let every operator that waits for the device raise."""
    if not setup.on_gpu:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def record(
    function: Callable[[], _Result], setup: Setup
) -> tuple[Callable[[], None], Callable[[], _Result]]:
    """Return what replays ``function``, and what returns its outputs then.

    Without a GPU a replay is a call.
    """
    if not setup.on_gpu:
        made: list[_Result] = [function()]

        def call() -> None:
            made[0] = function()

        return call, lambda: made[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph.replay, lambda: outputs


def _require_equal(found: Outputs, expected: Outputs, what: str) -> None:
    pairs = [
        *zip((*found.tree, *found.moves), (*expected.tree, *expected.moves), strict=True),
        (found.accepted, expected.accepted),
        (found.emitted, expected.emitted),
    ]
    for index, (mine, theirs) in enumerate(pairs):
        if not torch.equal(mine.cpu(), theirs.cpu()):
            raise AssertionError(f"{what}: tensor {index} of the step differs")

"""Trees and single paths of a published draft, beside the chains that `test_parity` compares."""

from __future__ import annotations

from itertools import accumulate, islice, takewhile
from operator import mul
from typing import Any

import pytest
import torch

from tests.draft_model.test_parity import Continuation
from tests.support.drafts import tree
from tests.support.engine import StartEngine
from tests.support.runners import runners
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import Served, mixed_requests, serve_requests
from vllm_vispec.trees.grow import TreeGrower
from vllm_vispec.trees.settings import TreeSettings

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

REQUESTS = mixed_requests(KIND, 8, 12, seed=3)
LEVELS, THRESHOLD = 4, 0.2
TREE = tree(19, top_k=3)
SETTINGS = TreeSettings(**TREE["tree"])


def _serve(engine: StartEngine, tiny: TinyStore, runner: str = "v1", **how: Any) -> Served:
    drafting = engine(runner, draft=tiny.sibling(), max_num_batched_tokens=96, **how)
    found: Served = drafting.once(serve_requests, REQUESTS)
    return found


def _path(threshold: float, policy: str = "spec_llava") -> dict[str, Any]:
    return tree(LEVELS, policy=policy, top_k=1, threshold=threshold)


def test_a_path_that_never_ends_is_a_chain(engine: StartEngine, tiny: TinyStore) -> None:
    chain = _serve(engine, tiny, num_draft_tokens=LEVELS)
    assert _serve(engine, tiny, **_path(0.0)).steps() == chain.steps()


def test_paths_end_where_the_model_is_unsure(engine: StartEngine, tiny: TinyStore) -> None:
    """As transformers computes the path's probability, step by step."""
    found, lengths = _serve(engine, tiny, **_path(THRESHOLD)), set()
    for request in REQUESTS:
        (one,) = found.results[request.name]
        if request.name.startswith("touching"):
            continue  # transformers takes images without anything between them for one
        continuation, done = Continuation(tiny.sibling(), request), 1
        for step in zip(one.drafted, one.per_step_accepted, strict=True):
            drafted, accepted = step
            # A step without drafts is none of those listed.
            while not (sure := _num_sure(continuation, one.token_ids[:done])):
                done += 1
            assert drafted == sure, (request.name, done)
            lengths.add(drafted)
            done += accepted + 1
        assert done >= len(one.token_ids)
    assert lengths == set(range(1, LEVELS + 1))


def _num_sure(continuation: Continuation, answered: list[int]) -> int:
    """Return how many tokens the model drafts before it is unsure of all of them together."""
    probabilities = (probability for _, probability in continuation.tokens(answered))
    paths = accumulate(islice(probabilities, LEVELS), mul)
    return sum(1 for _ in takewhile(lambda path: path >= THRESHOLD, paths))


def test_an_entropy_path_ends_earlier_than_its_chain(engine: StartEngine, tiny: TinyStore) -> None:
    steps = _serve(engine, tiny, **_path(0.5, "entropy")).steps()
    assert {drafted for drafted, _ in steps} >= {1, LEVELS}


def test_a_tree_accepts_more_than_its_chain(engine: StartEngine, tiny: TinyStore) -> None:
    chain = _serve(engine, tiny, num_draft_tokens=LEVELS)
    assert _serve(engine, tiny, **TREE).acceptance() > 1.2 * chain.acceptance()


@pytest.mark.parametrize("runner", runners("v1", "v2", "v2-overlay", slow=["v2"]))
def test_trees_are_those_of_transformers(engine: StartEngine, tiny: TinyStore, runner: str) -> None:
    """Whatever rows of rejected tokens hold: every step accepts what a tree of its own does."""
    found = _serve(engine, tiny, runner, max_num_seqs=4, **TREE)
    for request in REQUESTS:
        (one,) = found.results[request.name]
        if request.name.startswith("touching"):
            continue  # transformers takes images without anything between them for one
        continuation, done = Continuation(tiny.sibling(), request), 1
        for drafted, accepted in zip(one.drafted, one.per_step_accepted, strict=True):
            answered, truth = one.token_ids[:done], one.token_ids[done:]
            longest = _longest_path(continuation, answered, drafted, truth)
            # Behind the answer's end nobody knows what the target would have said.
            assert min(accepted, len(truth)) == longest, (request.name, done)
            done += accepted + 1
        assert done >= len(one.token_ids)


def _longest_path(
    continuation: Continuation, answered: list[int], num_nodes: int, truth: list[int]
) -> int:
    """Return how much of ``truth`` the tree has that grows behind an answer so far."""
    grower, paths = TreeGrower(SETTINGS), list[list[int]]([[]])
    frontier = grower.start_trees(continuation.next_logits(answered).unsqueeze(0))
    for _ in range(SETTINGS.depth):
        rows, tokens = frontier.parent_row[0].tolist(), frontier.token[0].tolist()
        paths = [[*paths[row], token] for row, token in zip(rows, tokens, strict=True)]
        logits = [continuation.next_logits(answered + path) for path in paths]
        frontier = grower.grow_level(torch.stack(logits).unsqueeze(0))
    tree, node = grower.finish_trees(num_nodes), 0
    nodes = list(zip(tree.parent[0].tolist(), tree.token[0].tolist(), strict=True))
    for length, token in enumerate(truth):
        if (node, token) not in nodes:
            return length
        node = 1 + nodes.index((node, token))
    return len(truth)

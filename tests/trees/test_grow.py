"""Draft trees on tensors against slow implementations with lists."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.tree_models import (
    VOCAB,
    Node,
    Path,
    certain_model,
    children,
    eagle2_reference,
    grow,
    node_paths,
    random_model,
)
from vllm_vispec.trees.codes import UNUSED
from vllm_vispec.trees.grow import NO_TOKEN, PathGrower, TreeGrower, best_path, likeliest
from vllm_vispec.trees.policies import NEVER, POLICIES
from vllm_vispec.trees.settings import Policy, TreeSettings

REQUESTS = 2


@pytest.mark.parametrize(("depth", "top_k", "num_nodes"), [(3, 8, 29), (1, 2, 6), (5, 10, 60)])
@pytest.mark.parametrize("sharpness", [0.5, 3.0, 12.0])
def test_eagle2_is_the_references_tree(
    depth: int, top_k: int, num_nodes: int, sharpness: float
) -> None:
    model = random_model(seed=depth, sharpness=sharpness)
    tree = grow(model, TreeSettings(depth=depth, top_k=top_k), REQUESTS, num_nodes)
    for request in range(REQUESTS):
        expected = eagle2_reference(model, request, depth, top_k, num_nodes)
        assert node_paths(tree, request) == [node.path for node in expected]


@pytest.mark.parametrize("policy", ["chain", "eagle2", "spec_llava", "entropy"])
def test_trees_are_well_formed(policy: Policy) -> None:
    """Depths and branches belong to the parents; siblings have different branches."""
    settings = TreeSettings(policy=policy, depth=4, top_k=6)
    tree = grow(random_model(1), settings, REQUESTS, 5 if policy == "chain" else 40)
    for request in range(REQUESTS):
        paths, branches = node_paths(tree, request), tree.path[request].tolist()
        kept = [place for place, path in enumerate(paths) if path]
        assert kept, policy
        assert kept == list(range(len(kept))), "places without a node come last"
        for place in kept:
            assert tree.depth[request, place] == len(paths[place])
            words = branches[place]
            assert [word == UNUSED for word in words] == [
                level >= len(paths[place]) for level in range(settings.levels)
            ]
            parent = int(tree.parent[request, place])
            above = branches[parent - 1] if parent else [UNUSED] * settings.levels
            assert words[: len(paths[place]) - 1] == above[: len(paths[place]) - 1]
        assert len({tuple(branches[place]) for place in kept}) == len(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_likeliest_tokens_by_their_logits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 to the bit what normalising whole rows first gave, in parts of rows or not."""
    generator = torch.Generator().manual_seed(0)
    logits_RWV = (4 * torch.randn(3, 5, 1000, generator=generator)).to(dtype)
    logp_RWC, token_RWC = logits_RWV.float().log_softmax(-1).topk(8)
    for elements in (2**24, 7 * 1000, 10):
        monkeypatch.setattr("vllm_vispec.trees.grow._MAX_ELEMENTS", elements)
        logp, token = likeliest(logits_RWV, 8)
        assert torch.equal(logp, logp_RWC)
        # 16 bits have many equal logits, whose order means nothing.
        assert torch.equal(logits_RWV.gather(-1, token), logits_RWV.gather(-1, token_RWC))
        if dtype == torch.float32:
            assert torch.equal(token, token_RWC)


def test_entropy_is_that_of_the_ten_likeliest() -> None:
    policy = POLICIES["entropy"](TreeSettings(policy="entropy"))
    logits_RV = 3 * torch.randn(4, 200, generator=torch.Generator().manual_seed(1))
    logp_RV = logits_RV.log_softmax(-1)
    ten_RT = logp_RV.topk(10).values.softmax(-1)
    expected_R = 1 + (ten_RT * ten_RT.log()).sum(-1) / math.log(10)
    observed = policy.observe(likeliest(logits_RV, 10)[0])
    assert policy.num_observed == 10
    torch.testing.assert_close(observed.flatten(), expected_R.clamp(0, 1))


@pytest.mark.parametrize("policy", ["eagle2", "spec_llava", "entropy"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_draft_that_overflows_grows_no_nonsense(policy: Policy, bad: float) -> None:
    """The target's output depends on it: parents come first, whatever the draft's logits are."""
    model = random_model(6)

    def broken(request: int, path: Path) -> torch.Tensor:
        logits = model(request, path)
        if len(path) == 1 + request:
            logits[3] = bad
        return logits

    tree = grow(broken, TreeSettings(policy=policy, depth=4, top_k=4), REQUESTS, 40)
    places = torch.arange(1, 41)
    is_node = tree.token != NO_TOKEN
    assert bool((tree.parent < places)[is_node].all())
    assert is_node.any(1).all()
    # Nothing grows behind a row that holds no distribution.
    assert [int(depth) for depth in (tree.depth * is_node).amax(1)] == [1, 2]
    assert likeliest(torch.full((1, 20), bad), 3)[0].tolist() == [[NEVER] * 3]


def test_certain_drafts_keep_parents_first() -> None:
    """Every score is 0: the order is decided by the sort alone."""
    settings = TreeSettings(policy="eagle2", depth=5, top_k=4)
    tree = grow(certain_model, settings, 1, 30)
    # Nothing but the chain is possible.
    assert node_paths(tree, 0)[:6] == [tuple(range(length)) for length in range(1, 7)]
    assert tree.token[0, 6:].tolist() == [NO_TOKEN] * 24


def test_any_head_of_the_list_is_a_tree() -> None:
    tree = grow(random_model(2), TreeSettings(), REQUESTS, 29)
    small = grow(random_model(2), TreeSettings(), REQUESTS, 7)
    for whole, head in zip(tree, small, strict=True):
        assert torch.equal(whole[:, :7], head)


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.3])
def test_single_paths_end_where_the_draft_is_unsure(threshold: float) -> None:
    model = random_model(5)
    settings = TreeSettings(policy="spec_llava", depth=4, threshold=threshold).one_branch()
    grower = PathGrower(settings)
    paths: list[Path] = [() for _ in range(REQUESTS)]
    frontier = grower.start_trees(torch.stack([model(i, path) for i, path in enumerate(paths)]))
    for _ in range(settings.depth):
        tokens = frontier.token[:, 0].tolist()
        paths = [(*path, token) for path, token in zip(paths, tokens, strict=True)]
        logits = torch.stack([model(i, path) for i, path in enumerate(paths)])
        frontier = grower.grow_level(logits.unsqueeze(1))
    found = grower.finish_paths(7)
    for request in range(REQUESTS):
        node, expected = Node(0.0, ()), []
        for _ in range(settings.levels):
            node = children(model, request, node, 1)[0]
            sure = node.score >= (math.log(threshold) if threshold else -math.inf)
            expected.append(node.path[-1] if sure else NO_TOKEN)
        assert found[request].tolist() == [*expected, NO_TOKEN, NO_TOKEN]
    assert grower.is_done() == (found[:, settings.levels - 1] == NO_TOKEN).all()


def test_growing_may_stop_early() -> None:
    """Levels that could grow nothing need no pass: the tree is the same without them."""
    settings = TreeSettings(policy="spec_llava", depth=5, top_k=3, threshold=0.3)
    grower, logits = TreeGrower(settings), torch.full((REQUESTS, 3, VOCAB), -20.0)
    # Two levels above the threshold, none below.
    for level, share in enumerate((0.0, 0.0, 4.0)):
        logits[..., : 2 + level] = share
        if level:
            grower.grow_level(logits)
        else:
            grower.start_trees(logits[:, 0])
        assert grower.is_done() == (level > 0)
    early = grower.finish_trees(18)
    for _ in range(3):
        grower.grow_level(logits)
    whole = grower.finish_trees(18)
    assert torch.equal(early.token, whole.token)
    kept = early.token != NO_TOKEN
    for mine, theirs in zip(early[1:], whole[1:], strict=True):
        assert torch.equal(mine[kept], theirs[kept])
    assert kept.any()
    assert [part.shape for part in early] == [part.shape for part in whole]


@pytest.mark.parametrize("threshold", [None, 0.0, 0.02, 0.3])
def test_spec_llava_prunes_by_the_paths_probability(threshold: float | None) -> None:
    model, least = random_model(4), 0.03 if threshold is None else threshold
    tree = grow(model, TreeSettings(policy="spec_llava", threshold=threshold), REQUESTS, 60)
    for request in range(REQUESTS):
        expected = [
            node.path
            for node in eagle2_reference(model, request, 3, 8, 60)
            if node.score >= (math.log(least) if least else -math.inf)
        ]
        found = [path for path in node_paths(tree, request) if path]
        assert found == expected


def test_entropy_shapes_the_tree() -> None:
    """A sure draft: a deep, narrow tree.  An unsure one: a shallow, wide one."""
    settings = TreeSettings(policy="entropy", depth=5, top_k=8)
    sure = grow(random_model(5, sharpness=300.0), settings, 1, 60)
    unsure = grow(lambda request, path: torch.zeros(VOCAB), settings, 1, 60)
    sure_lengths, unsure_lengths = ([*map(len, node_paths(one, 0))] for one in (sure, unsure))
    assert max(sure_lengths) == 6
    assert max(unsure_lengths) <= 3
    assert sure_lengths.count(1) <= 4
    assert unsure_lengths.count(1) == 8


def test_best_path_is_the_trees_first_line() -> None:
    tree = grow(random_model(6), TreeSettings(), REQUESTS, 29)
    chains = best_path(tree)
    for request in range(REQUESTS):
        paths = node_paths(tree, request)
        at: Path = ()
        line: list[int] = []
        while True:
            below = [path for path in paths if path[:-1] == at and path]
            if not below:
                break
            at = below[0]
            line.append(at[-1])
        assert chains.token[request].tolist() == line + [NO_TOKEN] * (29 - len(line))
    assert chains.parent[0].tolist() == list(range(29))
    assert chains.depth[0].tolist() == list(range(1, 30))
    assert bool((chains.path == UNUSED).all())

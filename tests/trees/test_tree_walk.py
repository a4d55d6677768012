"""The walk along the target's samples against one request at a time with plain lists."""

from __future__ import annotations

import pytest
import torch

from tests.support.tree_models import VOCAB, grow, random_model, slow_walk
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.trees.walk import walk


@pytest.mark.parametrize("seed", range(6))
def test_walk(seed: int) -> None:
    settings, requests, nodes = TreeSettings(depth=4, top_k=5), 40, 33
    tree = grow(random_model(seed), settings, requests, nodes)
    generator = torch.Generator().manual_seed(seed)
    token = torch.cat([torch.zeros(requests, 1, dtype=torch.int64), tree.token], 1)
    parent = torch.cat([torch.zeros(requests, 1, dtype=torch.int64), tree.parent], 1)
    # Requests end their trees where they like, as a scheduler may.
    length = torch.randint(0, nodes + 1, (requests, 1), generator=generator)
    token[torch.arange(nodes + 1) > length] = -1
    sampled = torch.randint(0, VOCAB, token.shape, generator=generator)
    # The target agrees with some child of most nodes.
    for request in range(requests):
        for node in range(nodes, 0, -1):
            if (node + request) % 5 and token[request, node] >= 0:
                sampled[request, parent[request, node]] = token[request, node]
    found = walk(sampled, token, parent, settings.levels)
    lengths = set()
    for request in range(requests):
        path = slow_walk(
            sampled[request].tolist(), token[request].tolist(), parent[request].tolist()
        )
        count = len(path) - 1
        lengths.add(count)
        assert found.accepted[request] == count
        assert found.path[request].tolist() == [*path, *range(len(path), settings.levels + 1)]
        emitted = [int(sampled[request, node]) for node in path]
        assert found.token[request].tolist() == emitted + [-1] * (settings.levels - count)
    assert lengths >= {0, 1, 2, 3}, "the walks must differ in length"


def test_paths_of_every_length() -> None:
    """Chains of 1 to 16 tokens, rejected at every place."""
    for levels in range(1, 17):
        token = torch.arange(levels + 1).expand(levels + 1, -1)
        parent = (token - 1).clamp(min=0)
        sampled = token + 1
        wrong = torch.arange(levels + 1)
        sampled = sampled.scatter(1, wrong.unsqueeze(1), 99)
        found = walk(sampled, token, parent, levels)
        assert found.accepted.tolist() == wrong.tolist()


def test_a_tree_with_all_paths_rejected() -> None:
    token, parent = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 0, 0]])
    found = walk(torch.tensor([[9, 1, 2]]), token, parent, levels=2)
    assert found.accepted.tolist() == [0]
    assert found.token.tolist() == [[9, -1, -1]]
    assert found.path.tolist() == [[0, 1, 2]]

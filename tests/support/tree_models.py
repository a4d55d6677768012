"""Made-up draft models for tests of trees: logits by path, and slow references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from vllm_vispec.trees.grow import DraftTree, Frontier, TreeGrower
from vllm_vispec.trees.settings import TreeSettings

VOCAB = 40
Path = tuple[int, ...]
Model = Callable[[int, Path], torch.Tensor]


def random_model(seed: int, sharpness: float = 3.0) -> Model:
    """Return a model whose logits ``[V]`` depend on the request and the whole path."""

    def logits(request: int, path: Path) -> torch.Tensor:
        key = hash((seed, request, *path)) % (2**31)
        return sharpness * torch.randn(VOCAB, generator=torch.Generator().manual_seed(key))

    return logits


def certain_model(request: int, path: Path) -> torch.Tensor:
    """Return logits of a draft that is sure of token ``len(path)``: every path's score is 0."""
    logits = torch.full((VOCAB,), float("-inf"))
    logits[len(path)] = 0.0
    return logits


def grow(model: Model, settings: TreeSettings, num_requests: int, num_nodes: int) -> DraftTree:
    """Grow trees as an engine does: a pass over the frontier for each level."""
    grower = TreeGrower(settings)
    paths: list[list[Path]] = [[()] for _ in range(num_requests)]
    frontier = grower.start_trees(_pass(model, paths)[:, 0])
    for _ in range(settings.depth):
        paths = _follow(paths, frontier)
        frontier = grower.grow_level(_pass(model, paths))
    return grower.finish_trees(num_nodes)


def _pass(model: Model, paths: list[list[Path]]) -> torch.Tensor:
    return torch.stack(
        [torch.stack([model(i, path) for path in row]) for i, row in enumerate(paths)]
    )


def _follow(paths: list[list[Path]], frontier: Frontier) -> list[list[Path]]:
    rows, tokens = frontier.parent_row.tolist(), frontier.token.tolist()
    return [
        [(*known[row], token) for row, token in zip(rows[i], tokens[i], strict=True)]
        for i, known in enumerate(paths)
    ]


class Node(NamedTuple):
    """A node of a slow reference."""

    score: float
    path: Path


def eagle2_reference(
    model: Model, request: int, depth: int, top_k: int, num_nodes: int
) -> list[Node]:
    """Build EAGLE-2's tree with plain lists: best nodes of all, best first."""
    frontier, grown = [Node(0.0, ())], []
    for _ in range(depth + 1):
        level = [child for node in frontier for child in children(model, request, node, top_k)]
        grown += level
        frontier = _best(level)[:top_k]
    return _best(grown)[:num_nodes]


def _best(nodes: list[Node]) -> list[Node]:
    """Sort by score; of equal ones the one grown first comes first."""
    return sorted(nodes, key=lambda node: -node.score)


def children(model: Model, request: int, node: Node, top_k: int) -> list[Node]:
    """Return a node's most likely children."""
    best = model(request, node.path).log_softmax(-1).topk(top_k)
    return [
        # Rounded as the tensors are, so that orders can be compared.
        Node((torch.tensor(node.score) + value).item(), (*node.path, int(token)))
        for value, token in zip(best.values, best.indices, strict=True)
    ]


def node_paths(tree: DraftTree, request: int) -> list[Path]:
    """Return the tokens down to each node; empty for places without a node."""
    paths: list[Path] = [()]
    tokens, parents = tree.token[request].tolist(), tree.parent[request].tolist()
    for place, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        assert parent <= place, "a parent must come first"
        paths.append((*paths[parent], token) if token >= 0 else ())
    return paths[1:]


def is_ancestor(parents: Sequence[int], ancestor: int, node: int) -> bool:
    """Whether ``ancestor`` lies on the path to ``node``, itself included; places with a root."""
    while node > ancestor:
        node = parents[node]
    return node == ancestor


def slow_walk(sampled: list[int], token: list[int], parent: list[int]) -> list[int]:
    """Return the nodes that a walk visits, the root first."""
    path = [0]
    while True:
        below = [
            node
            for node in range(1, len(token))
            if parent[node] == path[-1] and token[node] == sampled[path[-1]] >= 0
        ]
        if not below:
            return path
        path.append(below[0])

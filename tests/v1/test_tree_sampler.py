"""V1's sampler over trees, given logits by hand: tokens, log probabilities, draws.

Penalties and grammars beside trees are served by `tests/engine/test_lossless.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import random_sample
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from tests.support.operators import LiveBytes
from tests.support.tree_models import VOCAB, grow, random_model, slow_walk
from vllm_vispec.trees.grow import DraftTree
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.trees.verify import Moves, TreeBatch, TreeTable
from vllm_vispec.v1.cpu_repairs import expand_batch_to_tokens
from vllm_vispec.v1.tree_verification import TreeRejectionSampler

SETTINGS = TreeSettings(depth=2, top_k=3)
NODES = 10
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fixed_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's CPU kernel leaves temperatures unset; engines replace it in the same way."""
    monkeypatch.setattr(
        "vllm.v1.sample.rejection_sampler.expand_batch_to_tokens",
        partial(expand_batch_to_tokens, None),
    )


class _Trees:
    """Stands in for the runner's part."""

    def __init__(self, batch: TreeBatch | None) -> None:
        self._batch = batch
        self.accepted: list[Moves] = []

    def take_batch(self) -> TreeBatch | None:
        batch, self._batch = self._batch, None
        return batch

    def move_accepted(self, batch: TreeBatch, moves: Moves) -> None:
        self.accepted.append(moves)


def _metadata(token_rows: Sequence[Sequence[int]]) -> SpecDecodeMetadata:
    """Describe a batch of drafts as V1's runner does."""
    metadata = SpecDecodeMetadata.make_dummy([list(tokens) for tokens in token_rows], CPU)
    row = count()
    rows = [[next(row) for _ in range(len(tokens) + 1)] for tokens in token_rows]
    flat = [index for own in rows for index in own]
    return replace(
        metadata,
        target_logits_indices=torch.tensor(
            [i for own in rows for i in own[:-1]], dtype=torch.int64
        ),
        bonus_logits_indices=torch.tensor([own[-1] for own in rows]),
        logits_indices=torch.tensor(flat),
    )


def _sampling(num_requests: int, temperature: float = 0.0, **changes: Any) -> SamplingMetadata:
    zeros = torch.zeros(num_requests)
    values: dict[str, Any] = {
        "temperature": torch.full((num_requests,), temperature) if temperature else None,
        "all_greedy": not temperature,
        "all_random": bool(temperature),
        "top_p": None,
        "top_k": None,
        "generators": {},
        "max_num_logprobs": None,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": zeros,
        "presence_penalties": zeros,
        "repetition_penalties": torch.ones(num_requests),
        "output_token_ids": [],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
        "spec_token_ids": [[] for _ in range(num_requests)],
    }
    return SamplingMetadata(**(values | changes))


def _batch(table: TreeTable, slots: list[int], metadata: SpecDecodeMetadata) -> TreeBatch:
    starts, rows = F.pad(metadata.cu_num_sampled_tokens, (1, 0)), metadata.logits_indices
    return TreeBatch(table, torch.tensor(slots), starts, rows, len(rows))


def _trees(seed: int, num_requests: int) -> tuple[DraftTree, TreeTable]:
    """Return trees, and a table that has request r's in slot r."""
    tree = grow(random_model(seed), SETTINGS, num_requests, NODES)
    table = TreeTable(SETTINGS.levels, NODES, num_requests, CPU)
    table.write_trees(slice(num_requests), tree)
    return tree, table


def _emitted(found: Any) -> list[list[int]]:
    return [[token for token in row if token >= 0] for row in found.sampled_token_ids.tolist()]


def _sample(
    batch: TreeBatch, metadata: SpecDecodeMetadata, logits: torch.Tensor, sampling: SamplingMetadata
) -> Any:
    trees: Any = _Trees(batch)
    sampler = TreeRejectionSampler(Sampler(), None, CPU, trees)
    found = sampler(metadata, None, logits, sampling)
    assert len(trees.accepted) == 1
    return found


def _agreeing_logits(tree: DraftTree, request: int, generator: torch.Generator) -> torch.Tensor:
    """Return logits ``[J, V]`` whose argmax is a child's token behind most nodes."""
    logits = torch.randn(NODES + 1, VOCAB, generator=generator)
    for node in range(NODES, 0, -1):
        if (node + request) % 4:
            parent = int(tree.parent[request, node - 1])
            logits[parent, tree.token[request, node - 1]] = 9.0 + node / NODES
    return logits


def _rows(tree: DraftTree, request: int, length: int) -> tuple[list[int], list[int]]:
    """Return tokens and parents with the root of the first nodes of a tree."""
    return (
        [0, *tree.token[request, :length].tolist()],
        [0, *tree.parent[request, :length].tolist()],
    )


def test_greedy_tokens_and_their_log_probabilities() -> None:
    """Trees of several lengths, a request without drafts between them."""
    tree, table = _trees(3, 4)
    lengths = [NODES, 6, 0, 9]
    metadata = _metadata([tree.token[r, :n].tolist() for r, n in enumerate(lengths)])
    generator = torch.Generator().manual_seed(0)
    parts = [_agreeing_logits(tree, r, generator)[: n + 1] for r, n in enumerate(lengths)]
    sampling = _sampling(4, max_num_logprobs=2)
    found = _sample(
        _batch(table, [0, 1, table.no_tree, 3], metadata), metadata, torch.cat(parts), sampling
    )
    width = NODES + 1
    lengths_seen = set()
    for request, length in enumerate(lengths):
        sampled = parts[request].argmax(-1).tolist()
        path = slow_walk(sampled, *_rows(tree, request, length))
        lengths_seen.add(len(path))
        tokens = [sampled[node] for node in path]
        assert _emitted(found)[request] == tokens
        for place, node in enumerate(path):
            logprobs = found.logprobs_tensors.logprobs[request * (SETTINGS.levels + 1) + place]
            expected = parts[request][node].log_softmax(-1)
            assert logprobs[0] == pytest.approx(float(expected[tokens[place]]), abs=1e-5)
    assert found.sampled_token_ids.shape[1] <= width
    assert len(lengths_seen) >= 3


def _sequences(
    probs: torch.Tensor, tokens: list[int], parents: list[int]
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Yield everything a round can emit, with its probability."""
    open_paths: list[tuple[int, tuple[int, ...], float]] = [(0, (), 1.0)]
    while open_paths:
        node, emitted, probability = open_paths.pop()
        below = {tokens[n]: n for n in range(1, len(tokens)) if parents[n] == node}
        for token in range(probs.shape[1]):
            longer, both = (*emitted, token), probability * float(probs[node, token])
            if token in below:
                open_paths.append((below[token], longer, both))
            else:
                yield longer, both


@pytest.mark.parametrize("top_k", [None, 4])
def test_draws_have_the_targets_distribution(top_k: int | None) -> None:
    """What a round emits, against the product of the target's probabilities along the path."""
    num_requests, vocab, temperature = 4000, 6, 0.8
    settings = TreeSettings(depth=1, top_k=2)
    tree = grow(lambda request, path: torch.arange(vocab) * 1.0 + len(path), settings, 1, 4)
    table = TreeTable(settings.levels, 4, 1, CPU)
    table.write_trees(slice(1), tree)
    tokens, parents = _rows(tree, 0, 4)
    logits_JV = 1.5 * torch.randn(5, vocab, generator=torch.Generator().manual_seed(2))
    metadata = _metadata([tokens[1:]] * num_requests)
    batch = _batch(table, [0] * num_requests, metadata)
    kept = None if top_k is None else torch.full((num_requests,), top_k, dtype=torch.int32)
    sampling = _sampling(num_requests, temperature, top_k=kept)
    torch.manual_seed(0)
    found = _sample(batch, metadata, logits_JV.repeat(num_requests, 1), sampling)
    scaled = logits_JV / temperature
    if top_k is not None:
        lowest = scaled.topk(top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < lowest, float("-inf"))
    expected = dict(_sequences(scaled.softmax(-1), tokens, parents))
    assert sum(expected.values()) == pytest.approx(1)
    drawn = Counter(map(tuple, _emitted(found)))
    assert set(drawn) <= set(expected)
    frequent = [key for key, p in expected.items() if p * num_requests >= 8]
    observed = [drawn[key] for key in frequent]
    wanted = [expected[key] * num_requests for key in frequent]
    rest = num_requests - sum(observed)
    left = num_requests - sum(wanted)
    assert len(frequent) >= 6
    observed, wanted = ([*observed, rest], [*wanted, left]) if left > 1 else (observed, wanted)
    scale = sum(observed) / sum(wanted)
    assert chisquare(observed, [value * scale for value in wanted]).pvalue > 1e-3


def test_batches_draw_what_single_requests_draw() -> None:
    """A greedy request and one without drafts among them."""
    tree, table = _trees(6, 4)
    lengths, temperature = [NODES, 0, 6, NODES], torch.tensor([1.0, 1.0, 0.0, 0.7])
    drafts = [tree.token[r, :n].tolist() for r, n in enumerate(lengths)]
    generator = torch.Generator().manual_seed(4)
    parts = [torch.randn(length + 1, VOCAB, generator=generator) for length in lengths]

    # Each request's own generator decides, whatever torch's is.
    def drawn(requests: list[int]) -> list[list[int]]:
        metadata = _metadata([drafts[r] for r in requests])
        generators = {i: torch.Generator().manual_seed(r) for i, r in enumerate(requests)}
        sampling = _sampling(len(requests), 1.0, all_random=False, generators=generators)
        sampling = replace(sampling, temperature=temperature[requests])
        logits, batch = torch.cat([parts[r] for r in requests]), _batch(table, requests, metadata)
        return _emitted(_sample(batch, metadata, logits, sampling))

    assert drawn([0, 1, 2, 3]) == [row for request in range(4) for row in drawn([request])]


def test_what_is_drawn_is_what_plain_decoding_draws() -> None:
    """The first token behind a root, by its request's seed, as vLLM's own sampler draws it."""
    tree, table = _trees(7, 1)
    metadata = _metadata([tree.token[0].tolist()])
    logits = torch.randn(NODES + 1, VOCAB, generator=torch.Generator().manual_seed(8))
    for seed in range(8):
        generators = {0: torch.Generator().manual_seed(seed)}
        sampling = _sampling(1, 1.0, generators=generators)
        found = _sample(_batch(table, [0], metadata), metadata, logits.clone(), sampling)
        generators = {0: torch.Generator().manual_seed(seed)}
        plain = random_sample(logits[:1].softmax(-1), generators)
        assert int(found.sampled_token_ids[0, 0]) == int(plain[0])


def test_rows_are_held_once() -> None:
    """Sampling takes one copy in float32 of 16-bit logits, and one request's noise."""
    requests, vocab = 16, 4096
    metadata = _metadata([[1] * NODES] * requests)
    table = TreeTable(SETTINGS.levels, NODES, requests, CPU)
    logits = torch.randn(requests * (NODES + 1), vocab).bfloat16()
    batch = _batch(table, list(range(requests)), metadata)
    with LiveBytes() as live:
        _sample(batch, metadata, logits, _sampling(requests, 1.0))
    whole = logits.numel() * 4
    assert whole <= live.peak < 1.7 * whole

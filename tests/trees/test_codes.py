"""Ancestor-mask codes: padded attention over a row of nodes against attention under a dense mask.

Largest errors seen against float64, head size 128, unit normal inputs: 1.4e-6 in float32, 9.3e-3 in
bfloat16, the same as of plain causal attention over a sequence.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.tree_models import grow, is_ancestor, random_model
from vllm_vispec.trees.codes import (
    MIN_LOGIT,
    STRENGTH,
    UNUSED,
    CodeBuffers,
    PaddedBuffer,
    encode,
    mask_logit,
    word_tables,
)
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.trees.sizes import MAX_SIBLINGS, channels_per_level

PREFIX, NODES, HEADS = 37, 29, 4
CPU = torch.device("cpu")
QUERY, KEY = (4, 3, 19), (2, 3, 19)  # heads, head size, padded head size
LEVELS, TOP_K = 4, 4


@pytest.mark.parametrize("siblings", range(1, MAX_SIBLINGS + 1))
def test_words_of_a_level(siblings: int) -> None:
    """The same word cancels, two different ones never do, unused levels are silent.

    As few channels as tell the children apart; an only child needs none.
    """
    assert channels_per_level(siblings) == (0, 2, 3, 4, 4, 4, 5, 5, 5, 5)[siblings - 1]
    query, key = word_tables(siblings, torch.float32, CPU)
    product = query @ key.T
    for branch in range(siblings):
        assert product[branch, branch] == 0
        others = [other for other in range(siblings) if other != branch]
        assert bool((product[branch, others] <= -(STRENGTH**2)).all())
    assert bool((product[UNUSED] == 0).all())
    assert bool((product[:, UNUSED] == 0).all())


@pytest.mark.parametrize("head_size", [16, 64, 128, 256])
def test_masked_nodes_lie_far_below(head_size: int) -> None:
    assert mask_logit(head_size**-0.5) >= MIN_LOGIT


def _row(
    dtype: torch.dtype, head_size: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return padded queries and keys of a prefix and a tree, and who may see whom."""
    settings = TreeSettings(top_k=top_k)
    tree = grow(random_model(9), settings, 1, NODES)
    path = torch.full((PREFIX + 1 + NODES, settings.levels), UNUSED)
    path[PREFIX + 1 :] = tree.path[0]
    parents = [0, *tree.parent[0].tolist()]
    total = len(path)
    visible = torch.ones(total, total, dtype=torch.bool).tril()
    for node in range(1, NODES + 1):
        for other in range(1, NODES + 1):
            seen = other <= node and is_ancestor(parents, other, node)
            visible[PREFIX + node, PREFIX + other] = seen
    generator = torch.Generator().manual_seed(0)
    tables = word_tables(top_k, dtype, CPU)
    padded = []
    for table in tables:
        plain = torch.randn(HEADS, total, head_size, generator=generator).to(dtype)
        codes = encode(path, table).expand(HEADS, -1, -1)
        assert codes.shape[-1] == settings.num_channels
        padded.append(torch.cat([plain, codes], dim=-1))
    return padded[0], padded[1], visible


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and weights, products in float32 as kernels accumulate them."""
    logits = (query.float() @ key.float().mT) * scale
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.to(value.dtype) @ value, weights


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 3e-6), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize(("head_size", "top_k"), [(16, 8), (128, 8), (128, 3)])
def test_a_tree_in_a_row_equals_a_dense_mask(
    dtype: torch.dtype, error: float, head_size: int, top_k: int
) -> None:
    query, key, visible = _row(dtype, head_size, top_k)
    total, scale = visible.shape[0], head_size**-0.5
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(HEADS, total, head_size, generator=generator).to(dtype)
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    output, weights = _attend(query, key, value, scale, causal)
    assert bool((weights[:, ~visible] == 0).all()), "masked nodes must have no weight at all"
    plain_query, plain_key = query[..., :head_size].double(), key[..., :head_size].double()
    logits = (plain_query @ plain_key.mT * scale).masked_fill(~visible, float("-inf"))
    exact = logits.softmax(-1) @ value.double()
    assert (output.double() - exact).abs().max() <= error


def _buffers() -> tuple[CodeBuffers, PaddedBuffer, PaddedBuffer]:
    codes = CodeBuffers(LEVELS, TOP_K, 32, torch.float32, CPU)
    return codes, codes.query_buffer(QUERY), codes.key_buffer(KEY)


def _channels(buffer: PaddedBuffer) -> torch.Tensor:
    """Return what stands behind each token's first head, ``[T, 16]``."""
    return buffer.views(32)[0][:, 0, 3:]


def test_codes_are_written_and_cleared() -> None:
    codes, query, key = _buffers()
    value = codes.plain_buffer("value", KEY)
    path = torch.randint(0, TOP_K, (3, LEVELS))
    codes.write_target_codes(torch.tensor([4, 5, 9]), path, 10)
    tables = word_tables(TOP_K, torch.float32, CPU)
    assert codes.num_channels == 4 * LEVELS
    for buffer, table in zip((query, key), tables, strict=True):
        written = _channels(buffer)[[4, 5, 9], : codes.num_channels]
        assert torch.equal(written, encode(path, table))
        assert int(_channels(buffer).any(-1).sum()) == 3
    codes.write_target_codes(torch.tensor([0]), path[:1], 1)
    assert int(_channels(key).any(-1).sum()) == 1
    codes.clear_codes()
    codes.write_draft_codes(torch.zeros(5, LEVELS, dtype=torch.int64))
    assert [int(_channels(buffer).any(-1).sum()) for buffer in (query, key, value)] == [5, 5, 0]
    codes.clear_codes()
    assert not any(_channels(buffer).any() for buffer in (query, key))


def test_layers_of_a_shape_share_buffers() -> None:
    codes, query, key = _buffers()
    assert codes.query_buffer(QUERY) is query
    assert codes.query_buffer(KEY) is not key
    tables = codes.query_table.nbytes + codes.key_table.nbytes
    assert codes.num_bytes == 4 * 32 * 19 * (4 + 2 + 2) + tables
    value = codes.plain_buffer("value", KEY)
    for count in (5, 5, 3):
        given = torch.randn(count, 2, 3)
        padded = value.fill(given)
        assert padded.is_contiguous()
        assert torch.equal(padded[..., :3], given)
        assert not padded[..., 3:].any()

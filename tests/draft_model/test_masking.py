"""Rows that a published draft does not see have no weight at all, beside node codes or without.

Shapes: T tokens, H heads, P padded head size.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_vispec.draft_model.masking import MaskBuffers
from vllm_vispec.trees.codes import UNUSED

HEAD_SIZE, NUM_TOKENS = 32, 12
TREE = {"policy": "eagle2", "depth": 2, "top_k": 3}


def _buffers(tree: dict[str, Any] | None) -> MaskBuffers:
    section = {} if tree is None else {"tree": tree}
    config = SimpleNamespace(
        additional_config={"vispec": section},
        scheduler_config=SimpleNamespace(max_num_batched_tokens=16),
        speculative_config=SimpleNamespace(
            num_speculative_tokens=9, num_speculative_tokens_per_batch_size=None
        ),
    )
    return MaskBuffers(config)


@pytest.mark.parametrize("tree", [None, TREE], ids=["chain", "tree"])
def test_masked_rows_have_no_weight(tree: dict[str, Any] | None) -> None:
    masks = _buffers(tree)
    assert bool(masks.num_channels) == (tree is not None)
    shape = 2, HEAD_SIZE, HEAD_SIZE + masks.num_channels + 3
    query, key = masks.query_buffer(shape), masks.key_buffer(shape)
    generator = torch.Generator().manual_seed(0)
    plain = 4 * torch.randn(2, NUM_TOKENS, *shape[:2], generator=generator)
    is_masked_T = torch.arange(NUM_TOKENS) % 5 == 3

    def weights() -> torch.Tensor:
        query_THP, key_THP = query.fill(plain[0]), key.fill(plain[1])
        return (query_THP[-1, 0] @ key_THP[:, 0].T * HEAD_SIZE**-0.5).softmax(-1)

    seen = weights()
    masks.write_masks(is_masked_T)
    expected = seen.masked_fill(is_masked_T, 0)
    assert torch.allclose(weights(), expected / expected.sum(), atol=1e-6)
    assert bool((weights()[is_masked_T] == 0).all())
    # Levels of trees come and go; what masks stays.
    if tree is not None:
        masks.write_draft_codes(torch.full((4, 3), UNUSED))
        masks.clear_codes()
        assert bool((weights()[is_masked_T] == 0).all())
    masks.clear_masks()
    assert torch.equal(weights(), seen)

"""What we add to a GPU's memory at the sizes of real models; tensors here have sizes alone.

A card has 80 GiB.  Chains may take a hundredth of it for row tables and buffers, trees a GiB at 64
requests: buffers, and the most that lives at once in a round, without the logits that vLLM makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.operators import LiveBytes
from vllm_vispec.models.vispec import make_rows
from vllm_vispec.trees import target_cache
from vllm_vispec.trees.attention import LayerPadding
from vllm_vispec.trees.codes import CodeBuffers
from vllm_vispec.trees.grow import TreeGrower
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.trees.target_cache import TargetCache
from vllm_vispec.trees.verify import TreeBatch, TreeTable

GIB = 2**30
CHAIN_BUDGET = 80 * GIB // 100
TREE_BUDGET = GIB
TOKENS, NODES = 8192, 29
META = torch.device("meta")


@dataclass(frozen=True)
class Sizes:
    """A target's text model, and its share of a card.

    Attributes:
        width: Hidden size.
        layers: Of the target.
        heads, kv_heads: Of the target, with heads of 128; the draft's head has no fewer key/value
            heads than heads.
        vocab: Vocabulary.
        cards: Tensor parallel size.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    cards: int = 1


MODELS = {
    "Qwen2.5-VL-7B": Sizes(3584, 28, 28, 4, 152064),
    "LLaVA-1.5-13B": Sizes(5120, 40, 40, 40, 32064),
    # Its weights need four cards.
    "Qwen2.5-VL-72B": Sizes(8192, 80, 64, 8, 152064, cards=4),
}


def _head(sizes: Sizes, num_query_tokens: int) -> Any:
    return SimpleNamespace(
        hidden_size=sizes.width,
        num_query_tokens=num_query_tokens,
        has_adaptor=True,
        has_compressor=False,
        compressor_spec=SimpleNamespace(primitives=(), gated=False),
    )


@pytest.mark.parametrize("num_query_tokens", [2, 5, 17, 33, 65])
@pytest.mark.parametrize("model", MODELS)
def test_chains(model: str, num_query_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row table and the batch's rows, replicated on every card."""
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    head = _head(MODELS[model], num_query_tokens)
    with META:
        rows = make_rows(head, None, TOKENS, 256)
    num_bytes = sum(buffer.nbytes for buffer in rows.buffers())
    assert rows.ids.num_slots > 256
    assert TOKENS * head.hidden_size * 2 < num_bytes < CHAIN_BUDGET
    # An own number is the user's; the default shrinks for the largest tables alone.
    assert (rows.ids.num_slots == 1025) == (num_query_tokens * head.hidden_size <= 192 * 1024)
    with META:
        assert make_rows(head, 2000, 8, 256).ids.num_slots == 2001


class _Layer:
    """A padded layer of the target."""

    attn_backend = None

    def __init__(self, name: str, cache: torch.Tensor, padding: LayerPadding) -> None:
        self.layer_name, self.kv_cache = name, cache
        self.impl = SimpleNamespace(tree_padding=padding)


def _padding(codes: CodeBuffers, heads: int, kv_heads: int, size: int, padded: int) -> LayerPadding:
    layer = SimpleNamespace(num_heads=heads, num_kv_heads=kv_heads, head_size=size)
    return LayerPadding(layer, padded, codes)


def _cache(sizes: Sizes, padding: LayerPadding) -> TargetCache:
    heads, _, padded_size = padding.key_shape
    whole = torch.empty(sizes.layers, 64, heads, 16, 2 * padded_size, dtype=torch.bfloat16)
    return TargetCache([_Layer(str(n), cache, padding) for n, cache in enumerate(whole)])


@pytest.mark.parametrize("requests", [1, 64, 256])
@pytest.mark.parametrize("model", MODELS)
def test_trees(model: str, requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers at 8,192 tokens, and a round: grow, verify, walk, move; 256 requests take twice."""
    monkeypatch.setattr(target_cache, "find_elements", lambda layer: None)
    sizes, settings = MODELS[model], TreeSettings()
    heads, kv_heads = sizes.heads // sizes.cards, sizes.kv_heads // sizes.cards
    with META, LiveBytes() as live:
        codes = CodeBuffers(settings.levels, settings.top_k, TOKENS, torch.bfloat16, META)
        padding = _padding(codes, heads, kv_heads, 128, 152)
        _padding(codes, heads, heads, 136, 160)
        table = TreeTable(settings.levels, NODES, 256, META)
        cache = _cache(sizes, padding)
        of_vllm = live.live - codes.num_bytes - sum(b.nbytes for b in table.buffers())
        _round(cache, codes, table, settings, requests, sizes)
    peak = live.peak - of_vllm
    assert codes.num_bytes < peak < TREE_BUDGET * (2 if requests > 64 else 1)


def _round(
    cache: TargetCache,
    codes: CodeBuffers,
    table: TreeTable,
    settings: TreeSettings,
    num_requests: int,
    sizes: Sizes,
) -> None:
    slots_R = torch.arange(num_requests)
    grower = TreeGrower(settings)
    grower.start_trees(torch.empty(num_requests, sizes.vocab, dtype=torch.bfloat16))
    for _ in range(settings.depth):
        shape = num_requests, settings.top_k, sizes.vocab
        frontier = grower.grow_level(torch.empty(shape, dtype=torch.bfloat16))
        codes.write_draft_codes(frontier.path.flatten(0, 1))
    table.write_trees(slots_R, grower.finish_trees(NODES))
    num_rows, starts = num_requests * (NODES + 1), torch.arange(num_requests + 1) * (NODES + 1)
    token_S = torch.arange(num_rows)
    batch = TreeBatch(table, slots_R, starts, token_S, num_rows)
    codes.write_target_codes(token_S, batch.path, num_rows)
    _, moves = batch.verify(torch.empty(num_rows, dtype=torch.int64), token_S)
    names = {layer.layer_name for layer in cache._layers}
    mapping = dict.fromkeys(names, torch.empty(TOKENS, dtype=torch.int64))
    cache.move(mapping, token_S[moves.source], token_S[moves.place], moves.is_draft)

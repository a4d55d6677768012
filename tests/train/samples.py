"""Random samples and heads for the tests of rollout, losses and simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tests.support.heads import BASE
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.reference import ViSpecDraft
from vllm_vispec.train.target import Observed, Runs

# Lengths and image runs: apart, touching, at both ends, short, none.
LAYOUTS: list[tuple[int, Runs]] = [
    (23, ((3, 9),)),
    (17, ()),
    (26, ((2, 7), (7, 11))),
    (21, ((0, 6), (10, 12))),
    (15, ((9, 15),)),
    (12, ((1, 2), (4, 5), (5, 8))),
]
HEADS: dict[str, HeadConfig] = {
    "reference": BASE,
    "automodel": replace(BASE, layer0_input_norm=True, final_norm=True),
    "grouped": replace(BASE, num_key_value_heads=2, head_dim=10, qkv_bias=False, fc_bias=False),
    "one_query": replace(BASE, num_query_tokens=1),
    "no_global": replace(BASE, global_feature=False),
    "no_compress": replace(BASE, compress=False),
    "eagle": replace(BASE, compress=False, global_feature=False, has_embed_tokens=False),
}
# Images have 1 to 8 embeddings, so ratios are larger than some and queries more than others.
COMPRESSORS: dict[str, HeadConfig] = {
    name: replace(
        BASE,
        compressor=compressor,
        num_query_tokens=1,
        global_feature=global_feature,
        layer0_input_norm=True,
        has_embed_tokens=False,
    )
    for name, compressor, global_feature in (
        ("prune", "prune:3", False),
        ("pool", "pool:2", True),
        ("conv", "conv:3", False),
        ("resampler", "resampler:3", True),
        ("text_only", "text_only", False),
        ("concat", "concat(prune:4,pool:2,conv:2,resampler:2)", False),
        ("weighted", "weighted(prune:2,pool:2,conv:2)", True),
        ("select", "select(prune:3,pool:2,conv:2,resampler:2,text_only)", False),
        ("select_global", "select(pool:4,conv:2,text_only)", True),
    )
}
HEADS |= COMPRESSORS


def random_draft(config: HeadConfig, seed: int = 0) -> ViSpecDraft:
    """A draft whose every parameter matters."""
    generator = torch.Generator().manual_seed(seed)
    draft = ViSpecDraft(config)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.12)
    return draft


def random_sample(
    length: int, runs: Runs = (), answers: Sequence[tuple[int, int]] | None = None, **changes: Any
) -> Observed:
    """Random states; `answers` are spans of answer tokens, by default all text tokens."""
    generator = torch.Generator().manual_seed(length * 100 + len(runs))
    answer = torch.zeros(length, dtype=torch.bool)
    for start, end in [(0, length)] if answers is None else answers:
        answer[start:end] = True
    for start, end in runs:
        answer[start:end] = False
    size = BASE.hidden_size
    sample = Observed(
        sample_id=f"sample-{length}",
        family="",
        token_ids=torch.randint(BASE.vocab_size, (length,), generator=generator),
        answer=answer,
        runs=runs,
        embeds_LD=torch.randn(length, size, generator=generator),
        hidden_LD=torch.randn(length, size, generator=generator),
    )
    return replace(sample, **changes)


def all_samples() -> list[Observed]:
    """One sample of every layout."""
    return [random_sample(length, runs) for length, runs in LAYOUTS]

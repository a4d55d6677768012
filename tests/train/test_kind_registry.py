"""Kinds of heads and how they start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.train.samples import random_sample
from vllm_vispec.reference import tensor_shapes
from vllm_vispec.train.batch import pad_batch
from vllm_vispec.train.head_types import HEAD_TYPES, new_head_config
from vllm_vispec.train.init import new_draft
from vllm_vispec.train.rollout import rollout
from vllm_vispec.utils.errors import ViSpecError


def text_config(**changes: Any) -> SimpleNamespace:
    fields: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rms_norm_eps": 1e-6,
    }
    return SimpleNamespace(**(fields | changes))


TABLE = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", HEAD_TYPES)
def test_a_fresh_head_has_exactly_its_kinds_tensors(kind: str) -> None:
    config = new_head_config(kind, text_config(), target_model_type="qwen2_5_vl")
    draft = new_draft(config, TABLE, seed=0)
    shapes = {name: tuple(p.shape) for name, p in draft.named_parameters()}
    assert shapes == tensor_shapes(config)
    assert config.num_key_value_heads == config.num_attention_heads == 4
    assert config.rope_theta == 5e5
    assert (config.compress, config.global_feature) == (
        HEAD_TYPES[kind].compress,
        HEAD_TYPES[kind].global_feature,
    )


def test_only_text_eagle_is_trained_on_text_alone() -> None:
    assert [name for name, kind in HEAD_TYPES.items() if kind.text_only] == ["eagle_text"]


@pytest.mark.parametrize("kind", HEAD_TYPES)
def test_every_parameter_of_a_fresh_head_gets_a_gradient(kind: str) -> None:
    draft = new_draft(new_head_config(kind, text_config(), num_query_tokens=3), TABLE, seed=0)
    outputs = rollout(draft, pad_batch([random_sample(20, ((2, 9),))]), 2)
    torch.stack([(o.state_BLD[o.counts_BL] ** 2).sum() for o in outputs]).sum().backward()
    config = draft.config
    # In [I | 0] nothing of the global feature comes through yet; a step later it does.
    alone = config.global_feature and (config.has_compressor or not config.compress)
    late: tuple[str, ...] = ("img_adaptor.",) if alone else ()
    # A fresh gate chooses its first branch everywhere; noise and the load balance, which are the
    # trainer's, bring in the others.
    if config.compressor_spec.gated:
        late += ("compressor.",)
    if config.is_draft_vlm:
        late += ("lm_head.",)  # states alone were asked for
    silent = [
        name
        for name, parameter in draft.named_parameters()
        if not name.startswith(late) and not bool(parameter.grad.abs().sum() > 0)
    ]
    assert silent == []


def test_a_fresh_head_adds_embedding_and_state_and_ignores_the_image() -> None:
    draft = new_draft(new_head_config("vispec", text_config()), TABLE, seed=0)
    state, embed, image = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
    mixed = draft.layer_input(embed, state, image)
    assert torch.equal(mixed, draft.layer_input(embed, state, torch.zeros_like(image)))
    both = torch.stack((mixed.flatten(), (embed + state).flatten()))
    assert float(torch.corrcoef(both)[0, 1].detach()) > 0.95


def test_the_seed_decides_the_weights() -> None:
    config = new_head_config("vispec", text_config())
    first, same, other = (new_draft(config, TABLE, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["layer.mlp.up_proj.weight"], other["layer.mlp.up_proj.weight"])
    assert not torch.equal(first["img_adaptor.query"], other["img_adaptor.query"])


def test_an_own_embedding_table_is_copied_and_frozen() -> None:
    config = new_head_config("vispec", text_config(), has_embed_tokens=True)
    draft = new_draft(config, TABLE, seed=0)
    assert draft.embed_tokens is not None
    assert torch.equal(draft.embed_tokens.weight, TABLE)
    assert not draft.embed_tokens.weight.requires_grad


def test_changes_go_over_the_defaults() -> None:
    config = new_head_config(
        "vispec",
        text_config(head_dim=16),
        num_query_tokens=5,
        final_norm=True,
        num_key_value_heads=2,
    )
    assert (config.num_query_tokens, config.final_norm, config.num_key_value_heads) == (5, True, 2)
    assert config.head_dim == 16


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("medusa", {}, "unknown"),
        ("vispec", {"layers": 2}, "unknown"),
        ("eagle_vlm", {"compress": True}, "no head of type"),
        ("vispec", {"num_query_tokens": 0}, "num_query_tokens"),
    ],
)
def test_bad_settings_are_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ViSpecError, match=message):
        new_head_config(kind, text_config(), **changes)


def test_a_target_without_a_rope_base_is_named() -> None:
    with pytest.raises(ViSpecError, match="rope_theta"):
        new_head_config("vispec", text_config(rope_parameters=None))


def test_a_table_of_another_target_is_refused() -> None:
    with pytest.raises(ViSpecError, match="embedding table"):
        new_draft(new_head_config("vispec", text_config()), TABLE[:50], seed=0)

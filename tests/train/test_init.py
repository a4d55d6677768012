"""What drafts of every head type start from, and which recipes are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.heads import write_draft_vlm, write_head
from tests.train.language_models import write_language_model
from tests.train.samples import random_sample
from vllm_vispec.heads.folder import load_draft
from vllm_vispec.reference import DraftVlm, tensor_shapes
from vllm_vispec.train.config import HeadSettings
from vllm_vispec.train.head_types import HEAD_TYPES
from vllm_vispec.train.init import make_draft, new_draft, new_head_config
from vllm_vispec.train.rollout import rollout
from vllm_vispec.train.target import TargetFacts, pad_batch
from vllm_vispec.utils.errors import ViSpecError

GENERATOR = torch.Generator().manual_seed(1)
TABLE, LM_HEAD = torch.randn(2, 64, 32, generator=GENERATOR)
TEXT = SimpleNamespace(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    max_position_embeddings=128,
    rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    rms_norm_eps=1e-6,
)


def text(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**(vars(TEXT) | changes))


def start(init_from: Path | str = "", vocab: int = 64, **settings: Any) -> DraftVlm:
    facts = TargetFacts("qwen2_5_vl", text(vocab_size=vocab), TABLE[:vocab], LM_HEAD[:vocab])
    head = HeadSettings(kind="draft_vlm", init_from=str(init_from), **settings)
    draft = make_draft(head, facts, seed=0)
    assert isinstance(draft, DraftVlm)
    return draft


def test_a_fresh_one_has_the_targets_width_and_tables() -> None:
    draft = start()
    config = draft.config
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (4, 32, 8)
    assert (config.intermediate_size, config.vision_size, config.rope_theta) == (48, 32, 5e5)
    assert draft.lm_head is not None
    assert torch.equal(draft.embed_tokens.weight, TABLE)
    assert torch.equal(draft.lm_head.weight, LM_HEAD)
    assert all(parameter.requires_grad for parameter in draft.parameters())


def test_a_narrow_one() -> None:
    config = start(hidden_size=16, num_heads=2, num_layers=3).config
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (3, 16, 8)
    assert (config.num_attention_heads, config.intermediate_size) == (2, 24)
    assert config.vision_size == 32
    with pytest.raises(ViSpecError, match=r"head\.num_heads 3 does not divide"):
        start(hidden_size=16, num_heads=3)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_computes_what_it_did(tmp_path: Path, family: str, tied: bool) -> None:
    model = write_language_model(tmp_path, family, tie_word_embeddings=tied)
    draft = start(tmp_path)
    assert draft.config.tie_word_embeddings == tied
    assert draft.config.qkv_bias == (family == "qwen2")
    ids_BL = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits_BLV = draft(ids_BL, torch.zeros(2, 12, 32), [(), ()]) @ draft.head_VD.T
        # Rows are shifted: the first token is never read.
        wanted_BLV = model(ids_BL[:, 1:]).logits
    torch.testing.assert_close(logits_BLV[:, :-1], wanted_BLV, atol=1e-4, rtol=1e-4)


def test_padding_of_the_vocabulary_may_differ(tmp_path: Path) -> None:
    model = write_language_model(tmp_path, vocab_size=60)
    draft = start(tmp_path)
    assert draft.lm_head is not None
    theirs = model.lm_head.weight.detach()
    assert torch.equal(draft.lm_head.weight[:60], theirs)
    torch.testing.assert_close(draft.lm_head.weight[60:], theirs.mean(0).expand(4, -1))
    # A token without a row of its own is never the best.
    states = torch.randn(500, 24, generator=torch.Generator().manual_seed(2))
    assert int((states @ draft.head_VD.T).argmax(-1).max()) < 60
    assert torch.equal(start(tmp_path, vocab=48).head_VD, theirs[:48])


def test_a_projector_alone_is_trained(tmp_path: Path) -> None:
    write_language_model(tmp_path)
    draft = start(tmp_path, trained="projector")
    trained = {name for name, one in draft.named_parameters() if one.requires_grad}
    assert trained == {f"projector.linear_{n}.{part}" for n in "12" for part in ("weight", "bias")}


def test_the_next_stage_takes_everything_over(tmp_path: Path) -> None:
    write_draft_vlm(tmp_path)
    draft, wanted = start(tmp_path), load_draft(tmp_path).state_dict()
    assert all(torch.equal(one, wanted[name]) for name, one in draft.state_dict().items())
    assert all(parameter.requires_grad for parameter in draft.parameters())


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 900}, "has a vocabulary of 900 tokens, the target of 64"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, r"scales RoPE \(yarn\)"),
        ({"num_hidden_layers": 3}, r"Missing key.* \"layers\.2\."),
        ({"num_hidden_layers": 1}, r"Unexpected key.* \"layers\.1\."),
        ({"intermediate_size": 48}, r"size mismatch for layers\.0\.mlp"),
        ({"model_type": "gpt_neox"}, r"\(gpt_neox\) is a language model that no draft VLM"),
    ],
)
def test_language_models_that_do_not_fit(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_language_model(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ViSpecError, match=message):
        start(tmp_path)


def test_a_table_may_differ_by_its_padding_alone(tmp_path: Path) -> None:
    write_language_model(tmp_path, vocab_size=700)
    edit(tmp_path, vocab_size=64)
    with pytest.raises(ViSpecError, match=r"size mismatch for embed_tokens"):
        start(tmp_path)


def test_sizes_are_those_of_the_start(tmp_path: Path) -> None:
    write_language_model(tmp_path)
    with pytest.raises(ViSpecError, match=r"head\.num_layers is 5, head\.init_from .* has 2"):
        start(tmp_path, num_layers=5)
    assert start(tmp_path, num_layers=2, hidden_size=24, num_heads=3).config.hidden_size == 24


def test_kinds_do_not_start_from_each_other(tmp_path: Path) -> None:
    write_head(tmp_path / "head")
    with pytest.raises(ViSpecError, match="is a head on the target's states"):
        start(tmp_path / "head")
    write_draft_vlm(tmp_path / "vlm")
    settings = HeadSettings(kind="vispec", init_from=str(tmp_path / "vlm"))
    with pytest.raises(ViSpecError, match=r"is a draft VLM, head\.kind is 'vispec'"):
        make_draft(settings, TargetFacts("qwen2_5_vl", TEXT, TABLE, LM_HEAD), seed=0)


@pytest.mark.parametrize("kind", HEAD_TYPES)
def test_a_fresh_head_has_exactly_its_kinds_tensors(kind: str) -> None:
    config = new_head_config(kind, TEXT, target_model_type="qwen2_5_vl")
    draft = new_draft(config, TABLE, seed=0)
    shapes = {name: tuple(p.shape) for name, p in draft.named_parameters()}
    assert shapes == tensor_shapes(config)
    assert config.num_key_value_heads == config.num_attention_heads == 4
    assert config.rope_theta == 5e5
    assert (config.compress, config.global_feature) == (
        HEAD_TYPES[kind].compress,
        HEAD_TYPES[kind].global_feature,
    )


@pytest.mark.parametrize("kind", HEAD_TYPES)
def test_every_parameter_of_a_fresh_head_gets_a_gradient(kind: str) -> None:
    draft = new_draft(new_head_config(kind, TEXT, num_query_tokens=3), TABLE, seed=0)
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


def test_a_fresh_head_ignores_the_image() -> None:
    draft = new_draft(new_head_config("vispec", TEXT), TABLE, seed=0)
    state, embed, image = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
    mixed = draft.layer_input(embed, state, image)
    assert torch.equal(mixed, draft.layer_input(embed, state, torch.zeros_like(image)))


@pytest.mark.parametrize("kind", ["vispec", "draft_vlm"])
def test_the_seed_decides_the_weights(kind: str) -> None:
    config = new_head_config(kind, TEXT)
    first, same, other = (new_draft(config, TABLE, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    differing = {name for name in first if not torch.equal(first[name], other[name])}
    assert any("mlp.up_proj" in name for name in differing)
    assert kind == "draft_vlm" or "img_adaptor.query" in differing


def test_a_target_without_a_rope_base_is_named() -> None:
    assert new_head_config("vispec", text(head_dim=16)).head_dim == 16
    with pytest.raises(ViSpecError, match="rope_theta"):
        new_head_config("vispec", text(rope_parameters=None))
    by_layer = {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}}
    assert new_head_config("vispec", text(rope_parameters=by_layer)).rope_theta == 1e6

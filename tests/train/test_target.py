"""The frozen target in training: batched equals one by one, and bad targets are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil
import pytest
import torch

from tests.support.more_families import TRAINED
from tests.support.tiny_store import TinyStore
from vllm_vispec.data.encode import Encoded, Encoder
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import Conversation
from vllm_vispec.train.target import TrainingTarget, merge_vision, takes_token_types
from vllm_vispec.utils.errors import ViSpecError


def load(folder: Path, attention: str = "sdpa") -> TrainingTarget:
    return TrainingTarget.load(folder, torch.float32, "cpu", attention)


def encode(target: Path, data: Path, count: int) -> list[Encoded]:
    encoder = Encoder(load_processor(target), 512, data.parent)
    found = []
    for item in list(read_conversations(data))[:count]:
        assert isinstance(item, Conversation)
        encoded = encoder(item)
        assert isinstance(encoded, Encoded), encoded
        found.append(encoded)
    return found


@pytest.mark.parametrize("kind", TRAINED)
def test_batched_equals_one_by_one(kind: str, tiny: TinyStore, dialogues: Path) -> None:
    folder = tiny.target(kind)
    target, samples = load(folder), encode(folder, dialogues, 6)
    assert not any(p.requires_grad for p in target.model.parameters())
    assert len({len(sample.runs) for sample in samples}) == 3  # none, one image, two
    together = target.observe(samples)
    eager = load(folder, "eager").observe(samples)
    for sample, one, other in zip(samples, together, eager, strict=True):
        torch.testing.assert_close(one.hidden_LD, other.hidden_LD, atol=5e-5, rtol=1e-3)
        alone = target.observe([sample])[0]
        assert torch.equal(one.token_ids, sample.token_ids)
        assert one.runs == sample.runs
        torch.testing.assert_close(one.embeds_LD, alone.embeds_LD, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.hidden_LD, alone.hidden_LD, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", TRAINED)
def test_states_are_those_of_the_whole_model(kind: str, tiny: TinyStore, dialogues: Path) -> None:
    folder = tiny.target(kind)
    target = load(folder)
    encoded = encode(folder, dialogues, 2)[1]
    observed = target.observe([encoded])[0]
    inputs = {"input_ids": encoded.token_ids[None], **encoded.vision}
    if takes_token_types(target.model):
        inputs["mm_token_type_ids"] = (encoded.token_ids == target.image_token_id)[None].int()
    with torch.no_grad():
        logits = target.model(**inputs).logits[0]
    torch.testing.assert_close(
        observed.hidden_LD @ target.lm_head_VD.T, logits, atol=1e-4, rtol=1e-4
    )
    # Image rows hold features, text rows the table's embeddings.
    is_text = torch.ones(len(encoded.token_ids), dtype=torch.bool)
    for start, end in encoded.runs:
        is_text[start:end] = False
    same = (observed.embeds_LD == target.embed_VD[encoded.token_ids]).all(dim=1)
    assert torch.equal(same, is_text)


def test_targets_that_cannot_be_used(
    tiny: TinyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ViSpecError, match=r"target\.model .* is neither a folder nor a hub id"):
        load(tmp_path / "missing")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ViSpecError, match="has no vision part"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam"}))
    with pytest.raises(ViSpecError, match=r"\(sam\) has no language model"):
        load(tmp_path)
    folder = Path(shutil.copytree(tiny.target("llava"), tmp_path / "llava"))
    memory = psutil.virtual_memory()
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1e6))
        with pytest.raises(ViSpecError, match=r"takes 0\.00\d+ GB in torch.float32, 0\.001 GB are"):
            load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ViSpecError, match="cannot be loaded"):
        load(folder)


def test_prefix_lm_is_refused(tiny: TinyStore) -> None:
    with pytest.raises(ViSpecError, match="attends over images in both directions"):
        load(tiny.target("gemma3"))


def test_other_structure_is_refused(tmp_path: Path) -> None:
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    qformer = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1,
               "num_attention_heads": 2, "intermediate_size": 16,
               "encoder_hidden_size": 16}  # fmt: skip
    text = {"model_type": "opt", "vocab_size": 32, "hidden_size": 16, "ffn_dim": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 16,
            "max_position_embeddings": 32}  # fmt: skip
    config = Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text)
    Blip2ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ViSpecError, match=r"no\s+model\.language_model"):
        load(tmp_path)


def test_vision_of_other_shapes_is_padded() -> None:
    parts = [
        {"pixel_values": torch.ones(1, 3, 2, 2), "image_sizes": torch.ones(1, 2)},
        {},
        {"pixel_values": torch.ones(2, 5, 2, 2), "image_sizes": torch.ones(2, 2)},
    ]
    merged = merge_vision(parts)
    assert {name: tuple(value.shape) for name, value in merged.items()} == {
        "pixel_values": (3, 5, 2, 2),
        "image_sizes": (3, 2),
    }
    assert float(merged["pixel_values"][0].sum()) == 12

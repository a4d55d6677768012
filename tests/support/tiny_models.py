"""Tiny random VLMs that stock vLLM serves from a folder, built offline in a second or two.

Random models are hard to predict, which would leave a random head without accepted tokens. So the
language models get a structure: ``lm_head`` is the embedding table under a permutation, hence the
token's own embedding in the residual stream votes for a fixed successor, while the layers (and with
them the image and the whole context) outvote it about every third time. A head that copies the
embedding therefore accepts about half of its drafts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.more_families import ALL_FAMILIES
from tests.support.tiny_families import VOCAB, Family, byte_bpe_tokenizer, make_processor

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig

LOGIT_SCALE = 4.0
# Gain of the layers' output projections. The target follows its permutation in 80 % of the steps
# at 1.0, in 47 % at 1.3 and in 25 % at 1.7.
CONTEXT_SCALE = 1.2
CLIP_TOWERS = ("clip_vision_model", "siglip_vision_model")
CLIP_PREFIX = "vision_tower.vision_model."
OUTPUT_PROJECTIONS = ("o_proj.weight", "down_proj.weight")


def build_target(
    kind: str,
    folder: Path,
    seed: int = 0,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
) -> Path:
    """Write a tiny random target of family ``kind`` with tokenizer and processor to ``folder``.

    The weights are fp32 and depend on ``seed`` and sizes only. ``text`` changes its language
    model; such a model votes for the successors of seed 0. ``vision`` changes its tower, too.
    Returns ``folder``; an existing build of it is kept as it is.
    """
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from transformers import AutoModelForImageTextToText

    family = ALL_FAMILIES[kind]
    config = family.config()
    if text is not None:
        config = _resized(config, text, vision or {})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config).float().eval()
    _randomise_all(model, seed)
    _unscale_embedding(model)
    vote_for_successors(model, family, seed if text is None else 0)
    model.save_pretrained(folder)
    _publish(folder / "model.safetensors", kind, config.vision_config.model_type)
    make_processor(config, byte_bpe_tokenizer(family), family).save_pretrained(folder)
    ends = {"eos_token_id": config.get_text_config().eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(ends) + "\n")
    return folder


def build_text_model(kind: str, folder: Path, seed: int = 5) -> Path:
    """Write a tiny language model with the tokenizer of family ``kind`` to ``folder``."""
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    family = ALL_FAMILIES[kind]
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).float().eval()
    _randomise_all(model, seed)
    vote_for_successors(model, family, 0)
    model.save_pretrained(folder)
    processor = make_processor(family.config(), byte_bpe_tokenizer(family), family)
    processor.tokenizer.save_pretrained(folder)
    return folder


def _resized(
    config: PretrainedConfig, text: Mapping[str, Any], vision: Mapping[str, Any]
) -> PretrainedConfig:
    content = config.to_dict()
    content["text_config"] |= text
    content["vision_config"] |= vision
    content["tie_word_embeddings"] = text.get("tie_word_embeddings", False)
    content["text_config"].pop("layer_types", None)
    if "out_hidden_size" in content["vision_config"]:
        content["vision_config"]["out_hidden_size"] = content["text_config"]["hidden_size"]
    return type(config).from_dict(content)


def _randomise_all(model: torch.nn.Module, seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _randomise(name, weight, generator)


def vote_for_successors(model: torch.nn.Module, family: Family, seed: int) -> None:
    """Let the lm_head answer each word's embedding with one other word (one cycle of them all)."""
    import torch

    from vllm_vispec.train.target import embedding_table

    # Neither special tokens nor ids beyond the tokenizer.
    first, size = len(family.specials), byte_bpe_tokenizer(family).get_vocab_size()
    order = torch.randperm(size - first, generator=torch.Generator().manual_seed(seed + 1))
    cycle = first + order
    head = model.get_output_embeddings().weight
    if head is model.get_input_embeddings().weight:
        return  # One table, which votes for the word itself.
    embedding = embedding_table(model)
    with torch.no_grad():
        head.zero_()
        head[cycle.roll(-1)] = embedding[cycle] * (LOGIT_SCALE / embedding.shape[1] ** 0.5)


def _unscale_embedding(model: torch.nn.Module) -> None:
    """Let embeddings be as long as those of families that do not scale them."""
    import torch

    table = model.get_input_embeddings()
    with torch.no_grad():
        table.weight.div_(getattr(table, "embed_scale", 1.0))


def _publish(checkpoint: Path, kind: str, tower: str) -> None:
    """Name and shape tensors as published checkpoints do.

    Newer transformers drops a level of CLIP's names, and turns Qwen3-VL's experts round.
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint)
    if tower in CLIP_TOWERS:
        tensors = {
            name if "vision_model." in name else name.replace("vision_tower.", CLIP_PREFIX): tensor
            for name, tensor in tensors.items()
        }
    if kind == "qwen3_vl_moe":
        tensors = {
            name: tensor.transpose(1, 2).contiguous() if ".mlp.experts." in name else tensor
            for name, tensor in tensors.items()
        }
    save_file(tensors, checkpoint, metadata={"format": "pt"})


def _randomise(name: str, weight: torch.Tensor, generator: torch.Generator) -> None:
    noise = weight.new_empty(weight.shape).normal_(generator=generator)
    if "embed_tokens" in name or name.endswith("image_newline"):
        weight.copy_(noise)
    elif weight.ndim == 1:
        # Norms are as transformers starts them: around 1, or around 0 where 1 is added.
        weight.copy_((weight if name.endswith("weight") else 0) + 0.1 * noise)
    else:
        scale = (weight.numel() // weight.shape[0]) ** -0.5
        weight.copy_(noise * scale * _gain(name))


def _gain(name: str) -> float:
    is_text = "language_model" in name or name.startswith("model.layers.")
    if name.endswith("linear_attn.out_proj.weight"):
        return 0.5  # Behind a norm of each head's own.
    if is_text and name.endswith(OUTPUT_PROJECTIONS):
        return CONTEXT_SCALE
    # CLIP's features are not normed: without this LLaVA's image rows are 5 times as long as text.
    return 0.45 if name.endswith("multi_modal_projector.linear_2.weight") else 1.5


def random_image(seed: int, size: tuple[int, int] = (84, 84)) -> Image:
    """Return an RGB image of ``size`` (width, height) with coarse random blocks."""
    import numpy as np
    from PIL import Image as PilImage

    blocks = np.random.default_rng(seed).integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    return PilImage.fromarray(blocks).resize(size, PilImage.Resampling.NEAREST)

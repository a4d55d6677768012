"""Tiny random VLMs that stock vLLM serves from a folder, built offline in a second or two.

Random models are hard to predict, which would leave a random head without accepted tokens. So the
language models get a structure: ``lm_head`` is the embedding table under a permutation, hence the
token's own embedding in the residual stream votes for a fixed successor, while the layers (and with
them the image and the whole context) outvote it about every third time. A head that copies the
embedding therefore accepts about half of its drafts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.tiny_configs import FAMILIES, HIDDEN, VOCAB, Family
from tests.support.tiny_processors import PROCESSORS, TEMPLATES
from tests.support.tiny_tokenizers import byte_bpe_tokenizer, fast_tokenizer

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

LOGIT_SCALE = 4.0
# Gain of the layers' output projections. The target follows its permutation in 80 % of the steps
# at 1.0, in 47 % at 1.3 and in 25 % at 1.7.
CONTEXT_SCALE = 1.2
CLIP_PREFIX = "vision_tower.vision_model."
OUTPUT_PROJECTIONS = ("o_proj.weight", "down_proj.weight")


def build_target(kind: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny random target of family ``kind`` with tokenizer and processor to ``folder``.

    The weights are fp32 and depend on ``seed`` only. Returns ``folder``; an existing build of it is
    kept as it is.
    """
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    import transformers

    family = FAMILIES[kind]
    config = family.config()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, family.model_class)(config).float().eval()
        _randomise(model, family, seed)
    model.save_pretrained(folder)
    _publish_names(folder / "model.safetensors")
    _write_processor(family, folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": family.token_id(family.eos)}) + "\n"
    )
    return folder


def _publish_names(checkpoint: Path) -> None:
    """Name CLIP's tensors as published checkpoints do (newer transformers drops a level)."""
    from safetensors.torch import load_file, save_file

    tensors = {
        name if "vision_model." in name else name.replace("vision_tower.", CLIP_PREFIX): tensor
        for name, tensor in load_file(checkpoint).items()
    }
    save_file(tensors, checkpoint, metadata={"format": "pt"})


def _write_processor(family: Family, folder: Path) -> None:
    bpe = byte_bpe_tokenizer(VOCAB, family.specials)
    tokenizer = fast_tokenizer(
        bpe, eos=family.eos, pad=family.pad, bos=family.bos, template=TEMPLATES[family.kind]
    )
    PROCESSORS[family.kind](family.images, tokenizer).save_pretrained(folder)


def word_ids(family: Family) -> range:
    """Return the ids that stand for text: neither special nor beyond the tokenizer."""
    size = byte_bpe_tokenizer(VOCAB, family.specials).get_vocab_size()
    return range(len(family.specials), size)


def successors(family: Family, seed: int) -> torch.Tensor:
    """Return the token [VOCAB] that each token's embedding votes for (one cycle of the words)."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    words = torch.tensor(word_ids(family))
    cycle = words[torch.randperm(len(words), generator=generator)]
    table = torch.arange(VOCAB)
    table[cycle] = cycle.roll(-1)
    return table


def _randomise(model: torch.nn.Module, family: Family, seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _randomise_one(name, weight, generator)
        embedding = model.get_input_embeddings().weight
        head = model.get_output_embeddings().weight
        following = successors(family, seed)
        head.zero_()
        words = torch.tensor(word_ids(family))
        head[following[words]] = embedding[words] * (LOGIT_SCALE / HIDDEN**0.5)


def _randomise_one(name: str, weight: torch.Tensor, generator: torch.Generator) -> None:
    noise = weight.new_empty(weight.shape).normal_(generator=generator)
    if "embed_tokens" in name or name.endswith("image_newline"):
        weight.copy_(noise)
    elif weight.ndim == 1:
        is_norm = name.endswith("weight")
        weight.copy_(1 + 0.1 * noise if is_norm else 0.1 * noise)
    else:
        scale = (weight.numel() // weight.shape[0]) ** -0.5
        weight.copy_(noise * scale * _gain(name))


def _gain(name: str) -> float:
    if "language_model" in name and name.endswith(OUTPUT_PROJECTIONS):
        return CONTEXT_SCALE
    # CLIP's features are not normed: without this LLaVA's image rows are 5 times as long as text.
    return 0.45 if name.endswith("multi_modal_projector.linear_2.weight") else 1.5


def random_image(seed: int, size: tuple[int, int] = (84, 84)) -> Image:
    """Return an RGB image of ``size`` (width, height) with coarse random blocks."""
    import numpy as np
    from PIL import Image as PilImage

    blocks = np.random.default_rng(seed).integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    return PilImage.fromarray(blocks).resize(size, PilImage.Resampling.NEAREST)


def image_prompt(kind: str, question: str, num_images: int = 1) -> str:
    """Return a prompt of family ``kind``: preamble, image placeholders, ``question``."""
    family = FAMILIES[kind]
    return "A user asks: " + " and ".join([family.image_prompt] * num_images) + " " + question

"""A tiny text-only target with a plain EAGLE head, built from random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.support.tiny_configs import FAMILIES, HIDDEN
from tests.support.tiny_models import LOGIT_SCALE, successors, word_ids

KIND = "llava"  # whose tokenizer and language model it borrows
PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def build(source: Path, target: Path, head: Path) -> None:
    """Write a Llama ``target`` with the tokenizer of the tiny ``source``, and an EAGLE ``head``."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**FAMILIES[KIND].config().text_config.to_dict())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float().eval()
        noise = torch.randn(HIDDEN, HIDDEN) * HIDDEN**-0.5 * 0.3
    with torch.no_grad():
        embedding, output = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.normal_(generator=torch.Generator().manual_seed(1))
        words = torch.tensor(word_ids(FAMILIES[KIND]))
        output.zero_()
        output[successors(FAMILIES[KIND], 0)[words]] = embedding[words] * (
            LOGIT_SCALE / HIDDEN**0.5
        )
    model.save_pretrained(target)
    for name in PROCESSOR_FILES:
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    head.mkdir(parents=True, exist_ok=True)
    layer = {
        f"layers.0.{name}": tensor.clone()
        for name, tensor in model.model.layers[0].state_dict().items()
        if name != "input_layernorm.weight"  # EAGLE's layer has none
    }
    tensors = layer | {"fc.weight": torch.cat([torch.eye(HIDDEN), noise], dim=1)}
    tensors["embed_tokens.weight"] = embedding.detach().clone()
    save_file(tensors, head / "model.safetensors", metadata={"format": "pt"})
    settings = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    (head / "config.json").write_text(json.dumps(settings) + "\n")

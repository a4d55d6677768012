"""A plain EAGLE head with the sizes and weights of a ViSpec head.

Without an image a ViSpec head is an EAGLE head: its two fusions multiply to one. vLLM serves the
result with its own proposer, so that both can be timed on the same target.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_vispec.dialects import inspect_head, iter_canonical_tensors

Tensors = dict[str, torch.Tensor]


def write_eagle_head(vispec_head: Path, folder: Path) -> Path:
    """Write the EAGLE counterpart of a head; returns its folder."""
    info = inspect_head(vispec_head)
    source = dict(iter_canonical_tensors(info.folder))
    tensors = {
        name.replace("layer.", "layers.0.", 1): tensor
        for name, tensor in source.items()
        # EAGLE's first layer has no input norm.
        if name.startswith("layer.") and "input_layernorm" not in name
    }
    tensors["fc.weight"] = fused_fc(source)
    config = info.config.to_llama_config_dict()
    config.pop("vispec", None)
    config |= {"architectures": ["LlamaForCausalLM"], "qkv_bias": info.config.qkv_bias}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, _weights(folder))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def fused_fc(source: Tensors) -> torch.Tensor:
    """Return ``[F_e | F_h W_h]``, ``[D, 2D]``: what ``fc`` and ``img_fc`` do without an image."""
    fc_D2D = source["fc.weight"]
    size = fc_D2D.shape[0]
    if "img_fc.weight" not in source:
        return fc_D2D
    on_embedding, on_hidden = fc_D2D.float().split(size, dim=1)
    on_hidden = on_hidden @ source["img_fc.weight"].float()[:, :size]
    return torch.cat((on_embedding, on_hidden), dim=1).to(fc_D2D.dtype)


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"

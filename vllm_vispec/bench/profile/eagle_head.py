"""A plain EAGLE head with the sizes and weights of a ViSpec head.

Without an image a ViSpec head is an EAGLE head: its two fusions multiply to one. vLLM serves the
result with its own proposer, so that both can be timed on the same target. What it drafts behind an
image is worth less; a profile compares rounds, not how many there are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_vispec.heads import inspect_head, iter_canonical_tensors

if TYPE_CHECKING:
    from torch import Tensor


def write_eagle_head(vispec_head: str, folder: Path) -> str:
    """Write the EAGLE counterpart of a head; returns its folder.

    Args:
        vispec_head: folder or hub id, any dialect.

    Raises:
        ViSpecError: it is no usable head.
    """
    from safetensors.torch import save_file

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
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(content, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return str(folder)


def fused_fc(source: dict[str, Tensor]) -> Tensor:
    """Return ``[F_e | F_h W_h]``, ``[D, 2D]``: what ``fc`` and ``img_fc`` do without an image."""
    import torch

    fc_D2D = source["fc.weight"]
    size = fc_D2D.shape[0]
    if "img_fc.weight" not in source:
        return fc_D2D
    on_embedding, on_hidden = fc_D2D.float().split(size, dim=1)
    on_hidden = on_hidden @ source["img_fc.weight"].float()[:, :size]
    return torch.cat((on_embedding, on_hidden), dim=1).to(fc_D2D.dtype)

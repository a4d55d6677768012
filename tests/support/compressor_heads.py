"""Random compressors, and heads that get one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The gate's weights, in units of a normal start: large enough that prompts differ in what it says.
GATE_SCALE = 3.0


def random_compressor(
    text: str, hidden_size: int, num_heads: int, bias: bool, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return random tensors of the compressor ``text`` under canonical names (fp32)."""
    import torch

    from vllm_vispec.compressors.compressor import compressor_shapes
    from vllm_vispec.compressors.spec import parse_compressor

    shapes = compressor_shapes(parse_compressor(text), hidden_size, num_heads, bias)
    return {
        f"compressor.{name}": torch.empty(shape).normal_(generator=generator)
        * (shape[-1] ** -0.5 * (GATE_SCALE if name.startswith("gate.") else 1))
        for name, shape in shapes.items()
    }


def with_compressor(draft: Path, folder: Path, text: str) -> Path:
    """Write the ViSpec head ``draft`` with the random compressor ``text`` in place of its adaptor.

    The adaptor's last query stays, for the global feature. Returns ``folder``.
    """
    import torch
    from safetensors.torch import save_file

    from vllm_vispec.heads.config import HeadConfig
    from vllm_vispec.heads.folder import inspect_head, iter_canonical_tensors

    old = inspect_head(draft).config
    changes = {"compressor": text, "num_query_tokens": 1}
    head = HeadConfig(**(asdict(old) | changes))
    tensors = dict(iter_canonical_tensors(draft))
    tensors["img_adaptor.query"] = tensors["img_adaptor.query"][-1:].clone()
    sizes = (head.hidden_size, head.num_attention_heads, head.qkv_bias)
    tensors |= random_compressor(text, *sizes, torch.Generator().manual_seed(0))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(head.to_config_json("float32"), indent=2))
    return folder

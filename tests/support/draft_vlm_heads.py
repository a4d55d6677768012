"""Random draft VLMs for the tiny targets: narrower than these, and they draft what is accepted.

Embedding and lm_head are the target's, seen through one random map to fewer dimensions: rows stay
nearly orthogonal, so that each token still votes for the same successor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.tiny_configs import FAMILIES, HEAD_DIM, HIDDEN, MAX_POSITIONS, VOCAB

if TYPE_CHECKING:
    import torch

    from vllm_vispec.heads.config import HeadConfig

OUTPUTS = (".o_proj.weight", ".down_proj.weight")


@dataclass(frozen=True)
class DraftVlmSpec:
    """What distinguishes one random draft VLM from another; ``noise`` as of ``HeadSpec``."""

    kind: str
    hidden: int = 48
    layers: int = 2
    heads: int = 2
    kv_heads: int = 1
    qkv_bias: bool = True
    tied: bool = False
    noise: float = 0.6
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of its folder."""
        return "draft-vlm-" + "-".join(str(value) for value in vars(self).values())

    def config(self) -> HeadConfig:
        """Return its configuration."""
        from vllm_vispec.heads.config import HeadConfig

        family = FAMILIES[self.kind]
        return HeadConfig(
            target_model_type=self.kind,
            hidden_size=self.hidden,
            intermediate_size=2 * self.hidden,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=HEAD_DIM,
            vocab_size=VOCAB,
            max_position_embeddings=MAX_POSITIONS,
            rope_theta=family.rope_theta,
            rms_norm_eps=family.rms_norm_eps,
            num_query_tokens=1,
            qkv_bias=self.qkv_bias,
            fc_bias=False,
            layer0_input_norm=True,
            final_norm=True,
            global_feature=False,
            compress=False,
            num_hidden_layers=self.layers,
            vision_size=HIDDEN,
            tie_word_embeddings=self.tied,
        )


def build_draft_vlm(spec: DraftVlmSpec, target: Path, folder: Path) -> Path:
    """Write the draft VLM ``spec`` for the tiny ``target`` folder to ``folder`` and return it."""
    from safetensors.torch import load_file, save_file

    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(spec, load_file(target / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = spec.config().to_config_json("float32")
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def _tensors(spec: DraftVlmSpec, target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    import torch

    from vllm_vispec.reference import tensor_shapes

    generator = torch.Generator().manual_seed(spec.seed + 2000)
    map_WD = torch.randn(HIDDEN, spec.hidden, generator=generator) * HIDDEN**-0.5
    found = {}
    for name, shape in tensor_shapes(spec.config()).items():
        if name in ("embed_tokens.weight", "lm_head.weight"):
            found[name] = next(t for key, t in target.items() if key.endswith(name)) @ map_WD
            continue
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            found[name] = 1 + 0.1 * noise
        elif name.endswith("bias"):
            found[name] = 0.1 * noise
        else:
            scale = spec.noise if name.endswith(OUTPUTS) else 1.0
            found[name] = noise * scale * shape[1] ** -0.5
    return found

"""NeMo Automodel's export: `img_adaptor.*`, `vispec_num_query_tokens`, norms by flag."""

from __future__ import annotations

from typing import Any

from vllm_vispec.compressors.spec import QUERY
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.formats import fields
from vllm_vispec.heads.formats.base import Dialect, RawConfig, Shapes
from vllm_vispec.utils.errors import ViSpecError


def _detect(config: RawConfig, shapes: Shapes) -> bool:
    architectures = config.get("architectures") or ()
    return "VispecDraftModel" in architectures or any(n.startswith("img_adaptor.") for n in shapes)


def _query_tokens(config: RawConfig, shapes: Shapes) -> int:
    found = fields.query_tokens(shapes, "img_adaptor.query")
    stated = config.get("vispec_num_query_tokens", found)
    if stated != found:
        raise ViSpecError(
            f"vispec_num_query_tokens in the head's config.json is {stated!r}, but "
            f"'img_adaptor.query' holds {found}: set it to {found}"
        )
    return found


def _head_config(config: RawConfig, shapes: Shapes) -> HeadConfig:
    text = fields.text_fields(config)
    # Early exports have both norms and no flags; later ones state that they follow the reference
    # (no norms), and may still carry the unused weights. Without a flag the tensors decide.
    has_input_norm = "layers.0.input_layernorm.weight" in shapes
    skip_input_norm = fields.flag(text, "draft_skip_first_input_norm", not has_input_norm)
    final_norm = fields.flag(text, "draft_apply_final_norm", "norm.weight" in shapes)
    return HeadConfig(
        dialect="automodel",
        target_model_type=str(config.get("model_type", "")).removesuffix("_text"),
        **fields.common_fields(text, shapes),
        num_query_tokens=_query_tokens(text, shapes),
        qkv_bias=fields.flag(text, "qkv_bias", fields.flag(text, "attention_bias", False)),
        fc_bias=fields.flag(text, "fc_bias", "fc.bias" in shapes),
        layer0_input_norm=not skip_input_norm,
        final_norm=final_norm,
    )


def _write_config(head: HeadConfig, dtype: str) -> dict[str, Any]:
    return {
        **fields.target_like_config(head, dtype),
        "architectures": ["VispecDraftModel"],
        "head_dim": head.head_dim,
        "draft_num_hidden_layers": 1,
        "vispec_num_query_tokens": head.num_query_tokens,
        "fc_bias": head.fc_bias,
        "draft_skip_first_input_norm": not head.layer0_input_norm,
        "draft_apply_final_norm": head.final_norm,
    }


AUTOMODEL = Dialect(
    name="automodel",
    summary="NeMo Automodel exports (img_adaptor.*, vispec_num_query_tokens)",
    keys={
        "embed_tokens.weight": "embed_tokens.weight",
        "fc.*": "fc.*",
        "img_fc.*": "img_fc.*",
        "img_adaptor.*": "img_adaptor.*",
        "layers.0.*": "layer.*",
        "norm.weight": "norm.weight",
    },
    detect=_detect,
    head_config=_head_config,
    write_config=_write_config,
    fixed={"compress": True, "compressor": QUERY, "global_feature": True},
    ignored=("*.rotary_emb.*",),
    switched_off=("layer.input_layernorm.weight", "norm.weight"),
)

"""The layout of the published heads (KangJialiang/ViSpec): `imadpt.*`, no input or final norm."""

from __future__ import annotations

from typing import Any

from vllm_vispec.compressors.spec import QUERY
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.formats import fields
from vllm_vispec.heads.formats.base import Dialect, RawConfig, Shapes


def _detect(config: RawConfig, shapes: Shapes) -> bool:
    return any(name.startswith("imadpt.") for name in shapes)


def _head_config(config: RawConfig, shapes: Shapes) -> HeadConfig:
    # The config is a copy of the target's: its architecture and model_type name the target, and
    # everything about the draft that is not a text-model field has to be inferred.
    text = fields.text_fields(config)
    return HeadConfig(
        dialect="reference",
        target_model_type=str(config.get("model_type", "")),
        **fields.common_fields(text, shapes),
        num_query_tokens=fields.query_tokens(shapes, "imadpt.q"),
        qkv_bias=fields.flag(text, "qkv_bias", False),
        fc_bias=fields.flag(text, "bias", True),
        layer0_input_norm=False,
        final_norm=False,
    )


def _write_config(head: HeadConfig, dtype: str) -> dict[str, Any]:
    # num_q stands in the shape of the queries only.
    return {**fields.target_like_config(head, dtype), "bias": head.fc_bias}


REFERENCE = Dialect(
    name="reference",
    summary="published heads of KangJialiang/ViSpec (imadpt.*, no input norm, no final norm)",
    keys={
        "embed_tokens.weight": "embed_tokens.weight",
        "fc.*": "fc.*",
        "img_fc.*": "img_fc.*",
        "imadpt.q": "img_adaptor.query",
        "imadpt.*": "img_adaptor.*",
        "layers.0.*": "layer.*",
    },
    detect=_detect,
    head_config=_head_config,
    write_config=_write_config,
    fixed={
        "compress": True,
        "compressor": QUERY,
        "global_feature": True,
        "layer0_input_norm": False,
        "final_norm": False,
    },
    ignored=("*.rotary_emb.*",),
)

"""Our own layout: explicit flags under "vispec" in config.json, canonical tensor names."""

from __future__ import annotations

from vllm_vispec.heads.config import ARCHITECTURES, HeadConfig
from vllm_vispec.heads.formats.base import Dialect, RawConfig, Shapes
from vllm_vispec.heads.shapes import COMPRESSOR_PREFIX, PROJECTOR_PREFIX

# No other layout has tensors of such names.
_OUR_LAYER = "layer.self_attn."


def _detect(config: RawConfig, shapes: Shapes) -> bool:
    """Whether a folder is ours, also where its config.json lost our section or was replaced."""
    if isinstance(config.get("vispec"), dict):
        return True
    if config.get("speculators_model_type") not in (None, "vispec"):
        return False
    architectures = config.get("architectures") or ()
    return (
        "vispec" in config
        or any(name in ARCHITECTURES for name in architectures)
        or any(name.startswith(_OUR_LAYER) for name in shapes)
    )


def _head_config(config: RawConfig, shapes: Shapes) -> HeadConfig:
    return HeadConfig.from_config_json(config)


CANONICAL = Dialect(
    name="canonical",
    summary="folders written by `vispec convert` and by our training",
    keys={
        "embed_tokens.weight": "embed_tokens.weight",
        "fc.*": "fc.*",
        "img_fc.*": "img_fc.*",
        "img_adaptor.*": "img_adaptor.*",
        f"{COMPRESSOR_PREFIX}*": f"{COMPRESSOR_PREFIX}*",
        f"{PROJECTOR_PREFIX}*": f"{PROJECTOR_PREFIX}*",
        "layer.*": "layer.*",
        "layers.*": "layers.*",
        "norm.weight": "norm.weight",
        "lm_head.weight": "lm_head.weight",
    },
    detect=_detect,
    head_config=_head_config,
    write_config=lambda head, dtype: head.to_config_json(dtype),
)

"""Targets that vLLM runs by other means than plain attention layers over text and images."""

from __future__ import annotations

from typing import Any

from tests.support.tiny_families import (
    HEAD_DIM,
    IDS,
    QWEN3,
    TEXT,
    TOWER,
    Family,
    plain_family,
    qwen,
    qwen_pixels,
)

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def _qwen3_5(kind: str, **experts: Any) -> Family:
    """Three layers of gated delta nets and one of attention, as published ones have in turn."""
    text = {
        "head_dim": HEAD_DIM,
        "num_hidden_layers": 4,
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
        # The smallest that the kernels of vLLM's CPU build know.
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    rope = {
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.25,
    }
    return qwen(kind, rope, text | experts, QWEN3, depth=2, num_position_embeddings=64)


def _llama4_processor(config: Any, shared: dict[str, Any]) -> Any:
    import transformers

    size = config.vision_config.image_size
    return transformers.Llama4Processor(
        image_processor=transformers.Llama4ImageProcessor(
            size={"height": size, "width": size}, max_patches=4, resize_to_max_canvas=True
        ),
        patch_size=config.vision_config.patch_size,
        **shared,
    )


def _llama4() -> Family:
    names = "image image_start image_end patch tile_x_separator tile_y_separator"
    specials = " ".join(f"<|{name}|>" for name in names.split())
    settings = {
        "text_config": {
            "model_type": "llama4_text",
            **TEXT,
            "head_dim": HEAD_DIM,
            "num_hidden_layers": 2,
            "intermediate_size": 64,
            "intermediate_size_mlp": 192,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 64,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            **IDS,
        },
        "vision_config": {
            **TOWER,
            "image_size": 56,
            "patch_size": 14,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "intermediate_size": 128,
        },
        "boi_token_index": 4,
        "eoi_token_index": 5,
        "image_token_index": 6,
    }
    image = ("<|image|>", "<|image|>")
    return plain_family("llama4", specials, image, _llama4_processor, settings)


def _paddleocr_processor(config: Any, shared: dict[str, Any]) -> Any:
    import transformers

    return transformers.PaddleOCRVLProcessor(
        image_processor=transformers.PaddleOCRVLImageProcessor(
            **{**qwen_pixels(config.vision_config), "temporal_patch_size": 1}
        ),
        **shared,
    )


def _paddleocr() -> Family:
    image = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    names = "IMAGE_PLACEHOLDER IMAGE_START IMAGE_END VIDEO_PLACEHOLDER"
    specials = " ".join(f"<|{name}|>" for name in names.split())
    settings = {
        "text_config": {
            **TEXT,
            "head_dim": HEAD_DIM,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e5,
                "mrope_section": [4, 6, 6],
            },
            **IDS,
        },
        "vision_config": {**TOWER, "image_size": 56, "patch_size": 14},
        "image_token_id": 3,
        "vision_start_token_id": 4,
        "vision_end_token_id": 5,
        "video_token_id": 6,
    }
    return plain_family(
        "paddleocr_vl",
        specials,
        ("<|IMAGE_PLACEHOLDER|>", image),
        _paddleocr_processor,
        settings,
        extra_special_tokens={"image_token": "<|IMAGE_PLACEHOLDER|>"},
    )


HARD = (
    _qwen3_5("qwen3_5"),
    _qwen3_5("qwen3_5_moe", **_EXPERTS, shared_expert_intermediate_size=64),
    _llama4(),
    _paddleocr(),
)

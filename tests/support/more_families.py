"""Further families of tiny targets: those of `tests/engine/test_families.py`.

The four of :data:`FAMILIES` take part in every test by family, these in one file each of engine and
training. To add one, add it to ``_MORE``; those of other kinds of layers are in
`hard_families.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.hard_families import HARD
from tests.support.tiny_families import (
    FAMILIES,
    HEAD_DIM,
    HIDDEN,
    IDS,
    QWEN3,
    TEXT,
    TOWER,
    VOCAB,
    Family,
    plain_family,
    qwen,
    qwen_pixels,
)

_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}


def _text(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **TEXT, "rms_norm_eps": 1e-5, **_ROPE, **IDS, **changes}


def _internvl(config: Any, shared: dict[str, Any]) -> Any:
    import transformers

    edge = {
        "height": config.vision_config.image_size[0],
        "width": config.vision_config.image_size[1],
    }
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size=edge, crop_to_patches=True, min_patches=1, max_patches=2
        ),
        video_processor=transformers.InternVLVideoProcessor(size=edge),
        image_seq_length=config.image_seq_length,
        **shared,
    )


def _llava_onevision(config: Any, shared: dict[str, Any]) -> Any:
    import transformers

    size = config.vision_config.image_size
    edge = {"height": size, "width": size}
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size=edge, image_grid_pinpoints=config.image_grid_pinpoints
        ),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=edge),
        num_image_tokens=(size // config.vision_config.patch_size) ** 2,
        vision_feature_select_strategy="full",
        **shared,
    )


def _glm(config: Any, shared: dict[str, Any]) -> Any:
    import transformers

    pixels = qwen_pixels(config.vision_config)
    pixels["size"] = {name: 2 * pixel for name, pixel in pixels["size"].items()}
    return transformers.Glm4vProcessor(
        image_processor=transformers.Glm4vImageProcessor(**pixels),
        video_processor=transformers.Glm4vVideoProcessor(**pixels),
        **shared,
    )


def _pixtral(config: Any, shared: dict[str, Any]) -> Any:
    import transformers

    vision = config.vision_config
    merge = getattr(config, "spatial_merge_size", 1)
    patch = {"height": vision.patch_size * merge, "width": vision.patch_size * merge}
    return transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(
            size={"longest_edge": vision.image_size}, patch_size=patch
        ),
        patch_size=vision.patch_size,
        spatial_merge_size=merge,
        **shared,
    )


def _idefics(config: Any, shared: dict[str, Any]) -> Any:
    import transformers

    edge = config.vision_config.image_size
    return transformers.Idefics3Processor(
        image_processor=transformers.Idefics3ImageProcessor(
            size={"longest_edge": 2 * edge}, max_image_size={"longest_edge": edge}
        ),
        image_seq_len=(edge // config.vision_config.patch_size // config.scale_factor) ** 2,
        **shared,
    )


def _smolvlm(config: Any, shared: dict[str, Any]) -> Any:
    import transformers

    numbers_in_digits()
    edge = config.vision_config.image_size
    sizes = {"size": {"longest_edge": 2 * edge}, "max_image_size": {"longest_edge": edge}}
    return transformers.SmolVLMProcessor(
        image_processor=transformers.SmolVLMImageProcessor(**sizes),
        video_processor=transformers.SmolVLMVideoProcessor(**sizes),
        image_seq_len=(edge // config.vision_config.patch_size // config.scale_factor) ** 2,
        **shared,
    )


def numbers_in_digits() -> None:
    """Let SmolVLM's processor do without num2words, which spells numbers for videos."""
    from transformers.models.smolvlm import processing_smolvlm

    processing_smolvlm.num2words = processing_smolvlm.num2words or str


def _gemma3(config: Any, shared: dict[str, Any]) -> Any:
    import transformers

    edge = config.vision_config.image_size
    return transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(size={"height": edge, "width": edge}),
        image_seq_length=config.mm_tokens_per_image,
        **shared,
    )


def _gemma4(config: Any, shared: dict[str, Any]) -> Any:
    import transformers

    vision = config.vision_config
    pixels = {
        "patch_size": vision.patch_size,
        "pooling_kernel_size": vision.pooling_kernel_size,
        "max_soft_tokens": vision.default_output_length,
    }
    return transformers.Gemma4Processor(
        feature_extractor=transformers.Gemma4AudioFeatureExtractor(),
        image_processor=transformers.Gemma4ImageProcessor(**pixels),
        video_processor=transformers.Gemma4VideoProcessor(**pixels),
        image_seq_length=vision.default_output_length,
        **shared,
    )


_ROWS = " ".join(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
_AROUND = f"<fake_token_around_image> <end_of_utterance> <global-img> {_ROWS}"
_TILES = {
    "text_config": _text("llama"),
    "vision_config": {**TOWER, "image_size": 56, "patch_size": 14},
    "image_token_id": 3,
    "scale_factor": 2,
    "pad_token_id": 0,
}
_MORE = (
    qwen(
        "qwen2_vl",
        {"mrope_section": [4, 6, 6], "rope_theta": 1e6},
        {},
        ("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
        depth=2,
        embed_dim=32,
        hidden_size=HIDDEN,
        mlp_ratio=2,
    ),
    qwen(
        "qwen3_vl_moe",
        {"mrope_section": [6, 5, 5], "mrope_interleaved": True, "rope_theta": 5e6},
        {
            "head_dim": HEAD_DIM,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "moe_intermediate_size": 96,
        },
        QWEN3,
        depth=3,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
    ),
    plain_family(
        "internvl",
        "<IMG_CONTEXT> <img> </img> <video>",
        ("<IMG_CONTEXT>", "<IMG_CONTEXT>"),
        _internvl,
        {
            "text_config": _text("qwen2"),
            "vision_config": {**TOWER, "image_size": [112, 112], "patch_size": [14, 14]},
            "image_token_id": 3,
            "image_seq_length": 16,
        },
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    plain_family(
        "llava_onevision",
        "<image> <video>",
        ("<image>", "<image>"),
        _llava_onevision,
        {
            "text_config": _text("qwen2"),
            "vision_config": {
                **TOWER,
                "model_type": "siglip_vision_model",
                "image_size": 28,
                "patch_size": 14,
            },
            "image_token_index": 3,
            "video_token_index": 4,
            "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28]],
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
    ),
    plain_family(
        "glm4v",
        "<|image|> <|video|> <|begin_of_image|> <|end_of_image|> <|begin_of_video|> "
        "<|end_of_video|>",
        ("<|image|>", "<|begin_of_image|><|image|><|end_of_image|>"),
        _glm,
        {
            "text_config": _text(
                "glm4v_text",
                attention_bias=True,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [2, 3, 3],
                    "partial_rotary_factor": 0.5,
                },
            ),
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": HIDDEN,
                "image_size": 56,
            },
            "image_token_id": 3,
            "video_token_id": 4,
            "image_start_token_id": 5,
            "image_end_token_id": 6,
            "video_start_token_id": 7,
            "video_end_token_id": 8,
        },
    ),
    plain_family(
        "mistral3",
        "[IMG] [IMG_BREAK] [IMG_END]",
        ("[IMG]", "[IMG]"),
        _pixtral,
        {
            "text_config": _text("mistral", head_dim=HEAD_DIM, sliding_window=None),
            "vision_config": {
                **TOWER,
                "model_type": "pixtral",
                "image_size": 112,
                "patch_size": 14,
                "head_dim": 16,
            },
            "image_token_index": 3,
            "spatial_merge_size": 2,
        },
    ),
    plain_family(
        "idefics3",
        f"<image> {_AROUND}",
        ("<image>", "<image>"),
        _idefics,
        _TILES,
    ),
    plain_family("smolvlm", f"<image> <video> {_AROUND}", ("<image>", "<image>"), _smolvlm, _TILES),
    plain_family(
        "gemma3",
        "<image_soft_token> <start_of_image> <end_of_image>",
        ("<image_soft_token>", "<start_of_image>"),
        _gemma3,
        {
            "text_config": _text(
                "gemma3_text",
                head_dim=HEAD_DIM,
                query_pre_attn_scalar=HEAD_DIM,
                sliding_window=64,
                layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                rope_parameters=dict.fromkeys(
                    ("sliding_attention", "full_attention"), _ROPE["rope_parameters"]
                ),
            ),
            "vision_config": {
                **TOWER,
                "model_type": "siglip_vision_model",
                "image_size": 56,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 3,
            "boi_token_index": 4,
            "eoi_token_index": 5,
        },
        extra_special_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    ),
    plain_family(
        "gemma4",
        "<|image|> <|image> <image|> <|video|> <|audio|> <|audio> <audio|>",
        ("<|image|>", "<|image|>"),
        _gemma4,
        {
            "text_config": _text(
                "gemma4_text",
                head_dim=HEAD_DIM,
                global_head_dim=2 * HEAD_DIM,
                sliding_window=64,
                layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                hidden_size_per_layer_input=16,
                vocab_size_per_layer_input=VOCAB,
                final_logit_softcapping=None,
                rope_parameters={
                    "sliding_attention": _ROPE["rope_parameters"],
                    "full_attention": {
                        "rope_type": "proportional",
                        "partial_rotary_factor": 0.25,
                        "rope_theta": 1e6,
                    },
                },
            ),
            "vision_config": {
                **TOWER,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "pooling_kernel_size": 2,
                "patch_size": 8,
                "default_output_length": 70,
                "position_embedding_size": 64,
            },
            "audio_config": None,
            "image_token_id": 3,
            "boi_token_id": 4,
            "eoi_token_id": 5,
            "video_token_id": 6,
            "audio_token_id": 7,
            "boa_token_id": 8,
            "eoa_token_index": 9,
        },
        extra_special_tokens={
            "image_token": "<|image|>",
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
        },
    ),
)
ALL_FAMILIES: Mapping[str, Family] = {
    **FAMILIES,
    **{family.kind: family for family in (*_MORE, *HARD)},
}
REFUSED = ("gemma3",)
"""Families that are built to be refused."""
UNTRAINED = ("llama4",)
"""Families that training refuses: their models are not built as it knows them."""
EXPERTS = ("qwen3_vl_moe", "llama4")
"""Families of `tests/engine/test_families.py` with mixtures of experts."""
RECURRENT = ("qwen3_5", "qwen3_5_moe")
"""Families of `tests/engine/test_hybrids.py`."""
TRAINED = tuple(kind for kind in ALL_FAMILIES if kind not in (*REFUSED, *UNTRAINED))

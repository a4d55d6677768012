"""Configurations of the tiny targets: one entry per supported family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.support.tiny_processors import ImageSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HIDDEN = 128
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 32  # the smallest that vLLM's CPU attention supports
MLP = 192
LAYERS = 3
VOCAB = 1024
MAX_POSITIONS = 1024

QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
LLAVA_SPECIALS = ("<pad>", "<s>", "</s>", "<image>")


@dataclass(frozen=True)
class Family:
    """How one family is built: specials in id order, token roles, image settings and configs."""

    kind: str
    specials: tuple[str, ...]
    eos: str
    pad: str
    bos: str | None
    image_token: str
    image_prompt: str
    images: ImageSettings
    config: Callable[[], PretrainedConfig]
    model_class: str
    rope_theta: float
    rms_norm_eps: float

    def token_id(self, token: str) -> int:
        """Return the id of a special token."""
        return self.specials.index(token)


def _text(**extra: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
    } | extra


def _qwen_ids() -> dict[str, Any]:
    return {
        "image_token_id": QWEN_SPECIALS.index("<|image_pad|>"),
        "video_token_id": QWEN_SPECIALS.index("<|video_pad|>"),
        "vision_start_token_id": QWEN_SPECIALS.index("<|vision_start|>"),
        "vision_end_token_id": QWEN_SPECIALS.index("<|vision_end|>"),
        "tie_word_embeddings": False,
    }


def _qwen_text_ids() -> dict[str, int]:
    return {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}


def _qwen2_5() -> PretrainedConfig:
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "out_hidden_size": HIDDEN,
        "tokens_per_second": 2,
    }
    text = _text(rope_parameters=rope, rms_norm_eps=1e-6, **_qwen_text_ids())
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_qwen_ids())


def _qwen3() -> PretrainedConfig:
    from transformers import Qwen3VLConfig

    rope = {
        "rope_type": "default",
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
        "rope_theta": 5e6,
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
        "out_hidden_size": HIDDEN,
    }
    text = _text(rope_parameters=rope, rms_norm_eps=1e-6, head_dim=HEAD_DIM, **_qwen_text_ids())
    return Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_ids())


def _llava_parts(image_size: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": 14,
        "projection_dim": 32,
    }
    return {
        "text_config": _text(model_type="llama", rope_parameters=rope, rms_norm_eps=1e-5, **ids),
        "vision_config": vision,
        "image_token_index": LLAVA_SPECIALS.index("<image>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }


def _llava() -> PretrainedConfig:
    from transformers import LlavaConfig

    return LlavaConfig(image_seq_length=16, **_llava_parts(56))


PINPOINTS = ((28, 56), (56, 28), (56, 56))


def _llava_next() -> PretrainedConfig:
    from transformers import LlavaNextConfig

    pinpoints = [list(pair) for pair in PINPOINTS]
    return LlavaNextConfig(image_seq_length=4, image_grid_pinpoints=pinpoints, **_llava_parts(28))


def _qwen_family(kind: str, patch: int, **extra: Any) -> Family:
    unit = (2 * patch) ** 2
    return Family(
        kind=kind,
        specials=QWEN_SPECIALS,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        bos=None,
        image_token="<|image_pad|>",
        image_prompt="<|vision_start|><|image_pad|><|vision_end|>",
        images=ImageSettings(patch_size=patch, min_pixels=4 * unit, max_pixels=16 * unit),
        rms_norm_eps=1e-6,
        **extra,
    )


def _llava_family(kind: str, images: ImageSettings, **extra: Any) -> Family:
    return Family(
        kind=kind,
        specials=LLAVA_SPECIALS,
        eos="</s>",
        pad="<pad>",
        bos="<s>",
        image_token="<image>",
        image_prompt="<image>",
        images=images,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        **extra,
    )


FAMILIES: Mapping[str, Family] = {
    family.kind: family
    for family in (
        _qwen_family(
            "qwen2_5_vl",
            14,
            config=_qwen2_5,
            model_class="Qwen2_5_VLForConditionalGeneration",
            rope_theta=1e6,
        ),
        _qwen_family(
            "qwen3_vl",
            16,
            config=_qwen3,
            model_class="Qwen3VLForConditionalGeneration",
            rope_theta=5e6,
        ),
        _llava_family(
            "llava",
            ImageSettings(patch_size=14, image_size=56),
            config=_llava,
            model_class="LlavaForConditionalGeneration",
        ),
        _llava_family(
            "llava_next",
            ImageSettings(patch_size=14, image_size=28, grid_pinpoints=PINPOINTS),
            config=_llava_next,
            model_class="LlavaNextForConditionalGeneration",
        ),
    )
}

"""The real Hugging Face processors of the supported families, with settings for small images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, ProcessorMixin

QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] in ('image', 'image_url') %}<image>\n"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    " {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class ImageSettings:
    """What the processors need to know about the vision tower (sizes in pixels)."""

    patch_size: int
    merge_size: int = 2
    image_size: int = 56
    min_pixels: int = 28 * 28
    max_pixels: int = 112 * 112
    grid_pinpoints: tuple[tuple[int, int], ...] = ()


def qwen_pixel_kwargs(settings: ImageSettings) -> dict[str, Any]:
    """Return the image-processor settings of the Qwen-VL families."""
    return {
        "patch_size": settings.patch_size,
        "merge_size": settings.merge_size,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels},
    }


def _qwen2_5(settings: ImageSettings, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    pixels = qwen_pixel_kwargs(settings)
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=QWEN_TEMPLATE,
    )


def _qwen3(settings: ImageSettings, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    pixels = qwen_pixel_kwargs(settings)
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**pixels),
        chat_template=QWEN_TEMPLATE,
    )


def _clip_size(settings: ImageSettings) -> dict[str, Any]:
    edge = settings.image_size
    return {
        "size": {"shortest_edge": edge},
        "crop_size": {"height": edge, "width": edge},
    }


def _llava(settings: ImageSettings, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    from transformers import CLIPImageProcessor, LlavaProcessor

    return LlavaProcessor(
        image_processor=CLIPImageProcessor(**_clip_size(settings)),
        tokenizer=tokenizer,
        patch_size=settings.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=LLAVA_TEMPLATE,
    )


def _llava_next(settings: ImageSettings, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    pinpoints = [list(pair) for pair in settings.grid_pinpoints]
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            **_clip_size(settings), image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        patch_size=settings.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=LLAVA_TEMPLATE,
    )


ProcessorFactory = Callable[[ImageSettings, "PreTrainedTokenizerFast"], "ProcessorMixin"]

PROCESSORS: Mapping[str, ProcessorFactory] = {
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": _qwen3,
    "llava": _llava,
    "llava_next": _llava_next,
}
TEMPLATES: Mapping[str, str] = {
    "qwen2_5_vl": QWEN_TEMPLATE,
    "qwen3_vl": QWEN_TEMPLATE,
    "llava": LLAVA_TEMPLATE,
    "llava_next": LLAVA_TEMPLATE,
}

"""The families of the tiny targets: small configurations, a tokenizer, the real processors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig, ProcessorMixin

HIDDEN, VOCAB = 128, 1024
HEAD_DIM = 32  # the smallest that vLLM's CPU attention supports
TEXT: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOWER: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
"""What the further families have in common: ids of :func:`plain_family`, sizes of a tower."""
CORPUS = """
A user shows a picture and asks the assistant to describe what it contains, object by object.
The picture shows a red square, a green circle and a blue triangle on a white background.
How many yellow stars are there in the first image? There are three stars above the line.
Read the table out row by row, then read the chart and name its largest and smallest bar.
Please answer with a JSON object such as {"color": "red", "count": 3, "shape": "square"}.
Compare both pictures: which colours appear in the first one but not in the second one?
What is written on the sign? Transcribe the text exactly, with its punctuation and digits.
0123456789 10 20 30 40 50 60 70 80 90 100 200 500 1000 + - * / = < > ( ) [ ] { } : ; , . ! ?
"""
DRAFT_VLM_KIND: dict[str, Any] = {
    "num_query_tokens": 1,
    "qkv_bias": True,
    "fc_bias": False,
    "layer0_input_norm": True,
    "final_norm": True,
    "global_feature": False,
    "compress": False,
}
"""What every draft VLM has, whatever its sizes."""


@dataclass(frozen=True)
class Family:
    """How one family is built.

    Attributes:
        kind: The ``model_type`` of its config.json.
        specials: Special tokens in the order of their ids.
        roles: Which of them begin, end and pad a text.
        image_token: What an image becomes as often as it has tokens.
        image_prompt: What stands for an image in a prompt.
        settings: Those of its configuration.
        template: Its chat template.
        processor: Makes its real processor, for images of 4 to 16 tokens, from the configuration
            and what all processors take.
    """

    kind: str
    specials: tuple[str, ...]
    roles: Mapping[str, Any]
    image_token: str
    image_prompt: str
    settings: Mapping[str, Any]
    template: str
    processor: Callable[..., ProcessorMixin]

    def config(self) -> PretrainedConfig:
        """Return the configuration of the tiny target."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.kind, **deepcopy(dict(self.settings)))


def chat_template(role: str, image: str, end: str, answer: str) -> str:
    return (
        "{% for m in messages %}" + role + "{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for c in m['content'] %}{% if c['type'] in ('image', 'image_url') %}"
        + image
        + "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
        + end
        + "{% endfor %}{% if add_generation_prompt %}"
        + answer
        + "{% endif %}"
    )


QWEN_TEMPLATE = chat_template(
    "<|im_start|>{{ m['role'] }}\n",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|im_end|>\n",
    "<|im_start|>assistant\n",
)
LLAVA_TEMPLATE = chat_template("{{ m['role'] | upper }}: ", "<image>\n", " ", "ASSISTANT:")


def plain_family(
    kind: str,
    specials: str,
    image: tuple[str, str],
    processor: Any,
    settings: Mapping[str, Any],
    **roles: Any,
) -> Family:
    """Return a family with a plain chat template.

    ``image`` are the token that an image becomes, and what stands for an image in a prompt.
    """
    tokens = ("<pad>", "<s>", "</s>", *specials.split())
    return Family(
        kind,
        tokens,
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **roles},
        image[0],
        image[1],
        {"tie_word_embeddings": False, **settings},
        chat_template("<s>{{ m['role'] }}\n", image[1], "</s>\n", "<s>assistant\n"),
        processor,
    )


def qwen_pixels(vision: Any) -> dict[str, Any]:
    """Return what the image and the video processor of Qwen's kind are told."""
    unit = (vision.patch_size * vision.spatial_merge_size) ** 2
    return {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 4 * unit, "longest_edge": 16 * unit},
    }


def _qwen_processor(name: str, videos: str) -> Callable[..., ProcessorMixin]:
    def make(config: Any, shared: dict[str, Any]) -> Any:
        import transformers

        pixels = qwen_pixels(config.vision_config)
        images = transformers.Qwen2VLImageProcessor(**pixels)
        # vLLM normalises both alike, on the device.
        alike = {"image_mean": images.image_mean, "image_std": images.image_std}
        return getattr(transformers, name)(
            image_processor=images,
            video_processor=getattr(transformers, videos)(**pixels, **alike),
            **shared,
        )

    return make


def _llava_processor(config: Any, shared: dict[str, Any]) -> Any:
    import transformers

    vision = config.vision_config
    edge = vision.image_size
    sizes = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
    if config.model_type == "llava_next":
        make = transformers.LlavaNextProcessor
        sizes["image_grid_pinpoints"] = config.image_grid_pinpoints
        images = transformers.LlavaNextImageProcessor(**sizes)
    else:
        make = transformers.LlavaProcessor
        images = transformers.CLIPImageProcessor(**sizes)
    return make(
        image_processor=images,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        **shared,
    )


def qwen(
    kind: str,
    rope: dict[str, Any],
    text: dict[str, Any],
    processor: tuple[str, str],
    **vision: Any,
) -> Family:
    """Return a family of Qwen's kind; ``processor`` are the classes for images and for videos."""
    names = "endoftext im_start im_end vision_start vision_end image_pad video_pad"
    specials = tuple(f"<|{name}|>" for name in names.split())
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        **vision,
    }
    rope = {"rope_type": "default", **rope}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    settings = {
        "text_config": {**TEXT, "rms_norm_eps": 1e-6, "rope_parameters": rope, **ids, **text},
        "vision_config": vision,
        "vision_start_token_id": 3,
        "vision_end_token_id": 4,
        "image_token_id": 5,
        "video_token_id": 6,
        "tie_word_embeddings": False,
    }
    return Family(
        kind,
        specials,
        {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "<|image_pad|>",
        "<|vision_start|><|image_pad|><|vision_end|>",
        settings,
        QWEN_TEMPLATE,
        _qwen_processor(*processor),
    )


def _llava(kind: str, image_size: int, **settings: Any) -> Family:
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
    settings |= {
        "text_config": {
            **TEXT,
            "model_type": "llama",
            "rms_norm_eps": 1e-5,
            "rope_parameters": rope,
            **ids,
        },
        "vision_config": vision,
        "image_token_index": 3,
        "tie_word_embeddings": False,
    }
    return Family(
        kind,
        ("<pad>", "<s>", "</s>", "<image>"),
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        "<image>",
        "<image>",
        settings,
        LLAVA_TEMPLATE,
        _llava_processor,
    )


QWEN3 = ("Qwen3VLProcessor", "Qwen3VLVideoProcessor")
_FAMILIES = (
    qwen(
        "qwen2_5_vl",
        {"mrope_section": [4, 6, 6], "rope_theta": 1e6},
        {},
        ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
        depth=2,
        window_size=56,
        fullatt_block_indexes=[1],
        tokens_per_second=2,
    ),
    qwen(
        "qwen3_vl",
        {"mrope_section": [6, 5, 5], "mrope_interleaved": True, "rope_theta": 5e6},
        {"head_dim": HEAD_DIM},
        QWEN3,
        depth=3,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
    ),
    _llava("llava", 56, image_seq_length=16),
    _llava(
        "llava_next", 28, image_seq_length=4, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]]
    ),
)
FAMILIES: Mapping[str, Family] = {family.kind: family for family in _FAMILIES}


@lru_cache
def _trained_bpe(specials: tuple[str, ...]) -> str:
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(specials),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.strip().splitlines(), trainer)
    return str(tokenizer.to_str())


def byte_bpe_tokenizer(family: Family) -> Tokenizer:
    """Return a byte-level BPE tokenizer: special tokens come first, then 256 bytes, then merges.

    It may hold fewer than ``VOCAB`` tokens (the corpus is small).
    """
    from tokenizers import Tokenizer

    return Tokenizer.from_str(_trained_bpe(family.specials))


def make_processor(config: PretrainedConfig, tokenizer: Tokenizer, family: Family) -> Any:
    """Return the real processor of a target's family."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
        **family.roles,
    )
    return family.processor(config, {"tokenizer": fast, "chat_template": family.template})

"""`HeadConfig`: shape and flags of a head, how its config.json states them, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from vllm_vispec.compressors.spec import QUERY, CompressorSpec, parse_compressor
from vllm_vispec.utils.errors import ViSpecError

ARCHITECTURE = "EagleViSpecForCausalLM"
# A draft that takes the image tokens' embeddings in.
EMBEDS_ARCHITECTURE = "EagleViSpecEmbedsForCausalLM"
# An independent small vision-language model as the draft.
DRAFT_VLM_ARCHITECTURE = "EagleDraftVlmForCausalLM"
# A published model, as it is.
DRAFT_MODEL_ARCHITECTURE = "EagleDraftModelForCausalLM"
ARCHITECTURES = (
    ARCHITECTURE,
    EMBEDS_ARCHITECTURE,
    DRAFT_VLM_ARCHITECTURE,
    DRAFT_MODEL_ARCHITECTURE,
)
# Draft VLMs need version 3, heads with another compressor than ViSpec's version 2. All others are
# written as version 1.
FORMAT_VERSION = 3

# What vLLM reads from the flat part of config.json; the rest is in the "vispec" section.
LLAMA_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
# Written for draft VLMs only: the defaults are right for every other head.
_DRAFT_VLM_FIELDS = ("vision_size", "num_hidden_layers", "tie_word_embeddings")

# What every draft VLM has, and what only a draft VLM may change.
_OF_DRAFT_VLMS = {
    "compress": False,
    "global_feature": False,
    "num_query_tokens": 1,
    "compressor": QUERY,
    "fc_bias": False,
    "layer0_input_norm": True,
    "final_norm": True,
    "has_embed_tokens": True,
}
_OF_OTHER_HEADS = {"num_hidden_layers": 1, "tie_word_embeddings": False}


@dataclass(frozen=True)
class HeadConfig:
    """Shape and flags of one head.

    Attributes:
        target_model_type: `model_type` of the target it was trained for ("" if not stated).
        num_query_tokens: learned queries of the image adaptor. With `compress`, all but the last
            stand for an image in the draft. With `global_feature`, the last one is that feature.
            Without an adaptor the number has no effect.
        qkv_bias: bias on q/k/v of the layer and on k/v of the adaptor.
        fc_bias: bias on `fc` and `img_fc`.
        layer0_input_norm: the decoder layer norms its input before attention.
        final_norm: the layer's output is normed before lm_head and before the next step.
        global_feature: text rows get the global feature of the image before them. Without it there
            is no `img_fc`, and the layer reads fc([embedding, hidden]).
        compress: the compressor's tokens replace an image. Without it every image token keeps its
            row: a text row that reads the token's own image embedding.
        has_embed_tokens: the head ships its own embedding table (else the target's is used).
        compressor: makes these tokens, see `compressors.spec`; "query" is ViSpec's adaptor. With
            another one the adaptor makes the global feature only and has one query.
        num_hidden_layers: decoder layers; only a draft VLM may have more than one.
        vision_size: width of the target's image embeddings, which a draft VLM projects to its own
            `hidden_size`; 0: a head on the target's hidden states.
        tie_word_embeddings: a draft VLM's lm_head is its embedding table.

    Raises:
        ViSpecError: a value is impossible; the message names it.
    """

    target_model_type: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    num_query_tokens: int
    qkv_bias: bool
    fc_bias: bool
    layer0_input_norm: bool
    final_norm: bool
    global_feature: bool = True
    compress: bool = True
    has_embed_tokens: bool = True
    compressor: str = QUERY
    num_hidden_layers: int = 1
    vision_size: int = 0
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ViSpecError(
                f"num_key_value_heads={self.num_key_value_heads} of the head does not divide "
                f"num_attention_heads={self.num_attention_heads}: correct the head's config.json"
            )
        if self.head_dim % 2:
            raise ViSpecError(
                f"head_dim={self.head_dim} of the head is odd, RoPE needs an even one: correct "
                "the head's config.json"
            )
        _check_compressor(self)
        _check_draft_vlm(self)

    @cached_property
    def compressor_spec(self) -> CompressorSpec:
        """The compressor, parsed.

        Raises:
            ViSpecError: its text cannot be read.
        """
        return parse_compressor(self.compressor)

    @property
    def is_draft_vlm(self) -> bool:
        """Whether it is a vision-language model of its own, which reads no target states."""
        return self.vision_size > 0

    @property
    def has_compressor(self) -> bool:
        """Whether images go through a compressor other than ViSpec's adaptor."""
        return self.compress and not self.compressor_spec.is_query

    @property
    def has_adaptor(self) -> bool:
        """Whether there is an image adaptor: something has to use its output."""
        return self.global_feature or (self.compress and not self.has_compressor)

    @property
    def adaptor_head_dim(self) -> int:
        """Width of an adaptor head: always hidden_size / heads, whatever `head_dim` says."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rows_per_image(self) -> int | None:
        """Adaptor rows that stand for one image (a run may be too short to hold them all).

        None where that depends on the image: without compression, and with a compressor.
        """
        return self.num_query_tokens - 1 if self.compress and not self.has_compressor else None

    @property
    def architecture(self) -> str:
        """Name under which vLLM knows the draft's model class."""
        if self.is_draft_vlm:
            return DRAFT_VLM_ARCHITECTURE
        return ARCHITECTURE if self.compress else EMBEDS_ARCHITECTURE

    def to_llama_config_dict(self) -> dict[str, Any]:
        """Return the arguments of a plain transformers `LlamaConfig` that describes it to vLLM.

        `attention_bias` stays False on purpose: vLLM's Llama layer would apply it to o_proj too.
        The separate key `qkv_bias` gives q/k/v a bias and o_proj none. There is no RoPE scaling and
        no M-RoPE section: the draft uses plain 1-D RoPE for every target.
        """
        return {
            "architectures": [self.architecture],
            "model_type": "llama",
            **{name: getattr(self, name) for name in LLAMA_FIELDS},
            "num_hidden_layers": self.num_hidden_layers,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "qkv_bias": self.qkv_bias,
            "vispec": self.vispec_section(),
        }

    def vispec_section(self) -> dict[str, Any]:
        """Return the "vispec" section of config.json: the explicit flags."""
        version = 3 if self.is_draft_vlm else 2 if self.has_compressor else 1
        section: dict[str, Any] = {"format_version": version}
        section |= {name: getattr(self, name) for name in _VISPEC_FIELDS}
        if self.has_compressor:
            section["compressor"] = str(self.compressor_spec)
        if self.is_draft_vlm:
            section |= {name: getattr(self, name) for name in _DRAFT_VLM_FIELDS}
        return section

    def to_config_json(self, dtype: str) -> dict[str, Any]:
        """Return the content of a canonical folder's config.json; `dtype` is e.g. "bfloat16".

        `rope_theta` is written next to `rope_parameters` for readers older than transformers 5.
        """
        return self.to_llama_config_dict() | {"rope_theta": self.rope_theta, "dtype": dtype}

    @classmethod
    def from_config_json(cls, content: Mapping[str, Any]) -> HeadConfig:
        """Read a canonical config.json (also the dict form of a config made from it).

        Raises:
            ViSpecError: a field is missing, unknown or impossible.
        """
        section = content.get("vispec")
        if not isinstance(section, Mapping):
            raise ViSpecError(
                'config.json of the head has no "vispec" section, its tensors have our names: '
                "restore the config.json that was written with these weights"
            )
        version = section.get("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ViSpecError(
                f"the head's vispec.format_version is {version!r}, this release reads up to "
                f"{FORMAT_VERSION}: upgrade vllm-vispec"
            )
        # transformers 5 has the RoPE base in a section of its own.
        rope = content.get("rope_parameters")
        flat = {**content, **(rope if isinstance(rope, Mapping) else {})}
        values = {name: flat[name] for name in _FLAT_FIELDS if name in flat}
        values |= {
            name: section[name] for name in (*_VISPEC_FIELDS, *_OPTIONAL_FIELDS) if name in section
        }
        for name in (*_FLAT_FIELDS, *_VISPEC_FIELDS):
            if name not in values:
                raise ViSpecError(
                    f"config.json of the head lacks {name!r}: restore the config.json that was "
                    "written with these weights"
                )
        return cls(**values)


FIELD_NAMES = tuple(field.name for field in fields(HeadConfig))
_FLAT_FIELDS = (*LLAMA_FIELDS, "rope_theta")
_OPTIONAL_FIELDS = ("compressor", *_DRAFT_VLM_FIELDS)
# What the "vispec" section always has.
_VISPEC_FIELDS = tuple(n for n in FIELD_NAMES if n not in (*_FLAT_FIELDS, *_OPTIONAL_FIELDS))


def _check_types(config: HeadConfig) -> None:
    """Refuse values that are not of their field's type, or not above 0."""
    for field in fields(config):
        value = getattr(config, field.name)
        # 0: a head on the target's states.
        least = 0 if field.name == "vision_size" else 1
        fits, wanted = {
            "bool": (type(value) is bool, "true or false"),
            "int": (type(value) is int and value >= least, f"an integer of at least {least}"),
            "float": (type(value) in (int, float) and value > 0, "a positive number"),
            "str": (type(value) is str, "a text"),
        }[str(field.type)]
        if not fits:
            raise ViSpecError(
                f"{field.name} of the head is {value!r}, it must be {wanted}: correct the head's "
                "config.json or its weights"
            )


def _check_compressor(config: HeadConfig) -> None:
    if not config.compressor_spec.is_query and not config.compress:
        raise ViSpecError(
            f"compressor {config.compressor!r} of the head needs compress = true: set it, or "
            "drop the compressor"
        )
    if config.has_compressor and config.num_query_tokens != 1:
        raise ViSpecError(
            f"num_query_tokens={config.num_query_tokens} does not go with the compressor "
            f"{config.compressor!r} of the head: set it to 1, the global feature's query"
        )
    divides = config.hidden_size % config.num_attention_heads == 0
    if (config.has_adaptor or config.has_compressor) and not divides:
        raise ViSpecError(
            f"num_attention_heads={config.num_attention_heads} of the head does not divide "
            f"hidden_size={config.hidden_size}, which the image adaptor needs: correct the "
            "head's config.json"
        )


def _check_draft_vlm(config: HeadConfig) -> None:
    size = config.vision_size
    for name, value in (_OF_DRAFT_VLMS if config.is_draft_vlm else _OF_OTHER_HEADS).items():
        if getattr(config, name) != value:
            what = f"a draft VLM (vision_size={size})" if size else "a head without vision_size"
            raise ViSpecError(
                f"{name} of the head is {getattr(config, name)!r}, in {what} it must be {value!r}: "
                "correct the head's config.json"
            )

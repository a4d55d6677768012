"""`HeadConfig`: everything the engine has to know about a ViSpec head, with explicit flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from vllm_vispec.compressors.spec import QUERY, CompressorSpec, parse_compressor
from vllm_vispec.heads.checks import check_head, check_version, rope_theta_of
from vllm_vispec.heads.shapes import head_shapes
from vllm_vispec.utils.errors import ViSpecError

ARCHITECTURE = "EagleViSpecForCausalLM"
# A draft that takes the image tokens' embeddings in.
EMBEDS_ARCHITECTURE = "EagleViSpecEmbedsForCausalLM"
# An independent small vision language model as the draft.
DRAFT_VLM_ARCHITECTURE = "EagleDraftVlmForCausalLM"
ARCHITECTURES = (ARCHITECTURE, EMBEDS_ARCHITECTURE, DRAFT_VLM_ARCHITECTURE)
# Heads with another compressor than ViSpec's need version 2, draft VLMs version 3; others are
# written as version 1.
FORMAT_VERSION = 3

# What vLLM reads from the flat part of config.json; the rest lives in the "vispec" section.
_LLAMA_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
_VISPEC_FIELDS = (
    "target_model_type",
    "num_query_tokens",
    "qkv_bias",
    "fc_bias",
    "layer0_input_norm",
    "final_norm",
    "global_feature",
    "compress",
    "has_embed_tokens",
)
# Written for draft VLMs only: the defaults are right for every other head.
_DRAFT_VLM_FIELDS = ("vision_size", "num_hidden_layers", "tie_word_embeddings")


@dataclass(frozen=True)
class HeadConfig:
    """The shape and the flags of one ViSpec head.

    Attributes:
        dialect: name of the dialect the head was read as.
        target_model_type: `model_type` of the target it was trained for ("" if not stated).
        num_query_tokens: learned queries of the image adaptor. With `compress`,
            `num_query_tokens - 1` rows stand for an image in the draft; with `global_feature`, the
            last one is that feature. Without an influence where the head has no adaptor.
        qkv_bias: bias on q/k/v of the layer and on k/v of the adaptor.
        fc_bias: bias on `fc` and `img_fc`.
        layer0_input_norm: the decoder layer norms its input before attention.
        final_norm: the layer's output is normed before lm_head and before the next step.
        global_feature: text rows get the global feature of the image before them; without it
            there is no `img_fc` and the layer reads fc([embedding, hidden]).
        compress: an image is replaced by the compressor's tokens; without it every image token
            keeps its row, a text row that reads the token's own image embedding.
        compressor: what makes these tokens, see `models.spec`; "query" is ViSpec's adaptor. With
            another one the adaptor only makes the global feature and has one query.
        has_embed_tokens: the head ships its own embedding table (else the target's is used).
        num_hidden_layers: decoder layers; only a draft VLM may have more than one.
        vision_size: width of the target's image embeddings, which a draft VLM projects to its own
            `hidden_size`; 0 is a head on the target's hidden states.
        tie_word_embeddings: a draft VLM's lm_head is its embedding table.

    Raises:
        ViSpecError: a value is impossible; the message names it.
    """

    dialect: str
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
        check_head(self)

    @cached_property
    def compressor_spec(self) -> CompressorSpec:
        """The compressor, read.

        Raises:
            ViSpecError: its text cannot be read.
        """
        return parse_compressor(self.compressor)

    @property
    def is_draft_vlm(self) -> bool:
        """Whether it is a vision language model of its own, which reads no target states."""
        return self.vision_size > 0

    @property
    def has_compressor(self) -> bool:
        """Whether images go through a compressor other than ViSpec's adaptor."""
        return self.compress and not self.compressor_spec.is_query

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
    def has_adaptor(self) -> bool:
        """Whether there is an image adaptor: something has to use its output."""
        return self.global_feature or (self.compress and not self.has_compressor)

    @property
    def has_img_fc(self) -> bool:
        """Whether `img_fc` fuses a global feature into the hidden state."""
        return self.global_feature

    @property
    def architecture(self) -> str:
        """Name under which vLLM knows the draft's model class."""
        if self.is_draft_vlm:
            return DRAFT_VLM_ARCHITECTURE
        return ARCHITECTURE if self.compress else EMBEDS_ARCHITECTURE

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every tensor such a head consists of."""
        return head_shapes(self)

    def to_llama_config_dict(self) -> dict[str, Any]:
        """Keyword arguments of a plain transformers `LlamaConfig` that describes the head to vLLM.

        `attention_bias` stays False on purpose: vLLM's Llama layer would take it for o_proj too.
        The separate key `qkv_bias` gives q/k/v a bias and leaves o_proj without one. No rope
        scaling and no M-RoPE section: the draft uses plain 1-D RoPE for every target.
        """
        return {
            "architectures": [self.architecture],
            "model_type": "llama",
            **{name: getattr(self, name) for name in _LLAMA_FIELDS},
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
        """The explicit flags, as they stand under "vispec" in config.json."""
        version = 3 if self.is_draft_vlm else 2 if self.has_compressor else 1
        section: dict[str, Any] = {"format_version": version, "source_dialect": self.dialect}
        section.update({name: getattr(self, name) for name in _VISPEC_FIELDS})
        if self.has_compressor:
            section["compressor"] = str(self.compressor_spec)
        if self.is_draft_vlm:
            section.update({name: getattr(self, name) for name in _DRAFT_VLM_FIELDS})
        return section

    def to_config_json(self, dtype: str | None = None) -> dict[str, Any]:
        """Content of a canonical folder's config.json; `dtype` is e.g. "bfloat16".

        `rope_theta` is written next to `rope_parameters` for readers older than transformers 5.
        """
        content = self.to_llama_config_dict()
        content["rope_theta"] = self.rope_theta
        if dtype is not None:
            content["dtype"] = dtype
        return content

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
        check_version(section, FORMAT_VERSION)
        values: dict[str, Any] = {"dialect": "canonical", "rope_theta": rope_theta_of(content)}
        for name in ("compressor", *_DRAFT_VLM_FIELDS):
            if name in section:
                values[name] = section[name]
        for names, source, where in (
            (_LLAMA_FIELDS, content, "config.json"),
            (_VISPEC_FIELDS, section, 'the "vispec" section of config.json'),
        ):
            for name in names:
                if name not in source:
                    raise ViSpecError(
                        f"{where} of the head lacks {name!r}: restore the config.json that was "
                        "written with these weights"
                    )
                values[name] = source[name]
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    def with_dialect(self, dialect: str) -> HeadConfig:
        """The same head, said to come from another dialect."""
        return replace(self, dialect=dialect)


FIELD_NAMES = tuple(field.name for field in fields(HeadConfig))

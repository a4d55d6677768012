"""Checkpoint formats: the ways in which training codes write a ViSpec head.

A format is a table that maps its tensor names to ours, a function that recognises a folder, and one
that turns its config.json into a `HeadConfig`. To add one, write it like `REFERENCE` below and list
it in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from vllm_vispec.compressors.spec import QUERY
from vllm_vispec.heads import published_config as published
from vllm_vispec.heads.config import ARCHITECTURES, HeadConfig
from vllm_vispec.heads.published_config import RawConfig, Shapes
from vllm_vispec.utils.errors import ViSpecError


def _cannot_write(head: HeadConfig, dtype: str) -> dict[str, Any]:
    raise ViSpecError("heads of this format are only read: write the canonical format")


@dataclass(frozen=True)
class CheckpointFormat:
    """One layout of config.json and tensor names.

    Attributes:
        name: as in logs, errors and `vispec convert --format`.
        summary: one line for users.
        keys: templates "their name" -> "our name"; a trailing `*` stands for the rest of the name.
            The first template that matches wins.
        detect: says whether a folder with this config.json and these tensors is of the format.
        read_config: makes the `HeadConfig`; raises `ViSpecError` on impossible values.
        write_config: makes the config.json of a head, given the dtype of its weights.
        fixed: flags of `HeadConfig` that every head of the format has.
        ignored: patterns of tensor names that carry nothing we need.
        switched_off: canonical names that may be present although the flags do not use them.
    """

    name: str
    summary: str
    keys: Mapping[str, str]
    detect: Callable[[RawConfig, Shapes], bool]
    read_config: Callable[[RawConfig, Shapes], HeadConfig]
    write_config: Callable[[HeadConfig, str], dict[str, Any]] = _cannot_write
    fixed: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    switched_off: tuple[str, ...] = ()

    def canonical_name(self, source_name: str) -> str | None:
        """Return our name of a tensor; None if the format does not know it or has no use for it."""
        return None if self.is_ignored(source_name) else _translate(source_name, self.keys.items())

    def is_ignored(self, source_name: str) -> bool:
        """Whether a tensor is known and of no use."""
        return any(fnmatchcase(source_name, pattern) for pattern in self.ignored)

    def source_name(self, canonical_name: str) -> str:
        """Return their name of one of our tensors."""
        back = ((ours, theirs) for theirs, ours in self.keys.items())
        return _translate(canonical_name, back) or canonical_name

    def check_expressible(self, head: HeadConfig) -> None:
        """Refuse to write a head of a kind that the format does not know.

        Raises:
            ViSpecError: names the flag.
        """
        for name, value in self.fixed.items():
            if getattr(head, name) != value:
                raise ViSpecError(
                    f"the {self.name} format knows only heads with {name}={value}, this one has "
                    f"{name}={getattr(head, name)}: write it in the canonical format"
                )


def _translate(name: str, templates: Iterable[tuple[str, str]]) -> str | None:
    for template, other in templates:
        if template == name:
            return other
        if template.endswith("*") and name.startswith(template[:-1]):
            return other[:-1] + name[len(template) - 1 :]
    return None


def _is_canonical(config: RawConfig, shapes: Shapes) -> bool:
    """Whether a folder is ours, even if its config.json lost our section or was replaced."""
    if "vispec" in config:
        return True
    if config.get("speculators_model_type") not in (None, "vispec"):
        return False
    return any(name in ARCHITECTURES for name in config.get("architectures") or ()) or any(
        # No other format has tensors of such names.
        name.startswith("layer.self_attn.")
        for name in shapes
    )


CANONICAL = CheckpointFormat(
    name="canonical",
    summary="folders written by `vispec convert` and by our training",
    keys={
        name: name
        for name in (
            "embed_tokens.weight",
            "fc.*",
            "img_fc.*",
            "img_adaptor.*",
            "compressor.*",
            "projector.*",
            "layer.*",
            "layers.*",
            "norm.weight",
            "lm_head.weight",
        )
    },
    detect=_is_canonical,
    read_config=lambda config, shapes: HeadConfig.from_config_json(config),
    write_config=lambda head, dtype: head.to_config_json(dtype),
)


_PUBLISHED_KEYS = {
    "embed_tokens.weight": "embed_tokens.weight",
    "fc.*": "fc.*",
    "img_fc.*": "img_fc.*",
    "layers.0.*": "layer.*",
}


def _is_automodel(config: RawConfig, shapes: Shapes) -> bool:
    architectures = config.get("architectures") or ()
    return "VispecDraftModel" in architectures or any(n.startswith("img_adaptor.") for n in shapes)


def _read_automodel(config: RawConfig, shapes: Shapes) -> HeadConfig:
    text = published.text_fields(config)
    num_query_tokens = published.query_tokens(shapes, "img_adaptor.query")
    stated = text.get("vispec_num_query_tokens", num_query_tokens)
    if stated != num_query_tokens:
        raise ViSpecError(
            f"vispec_num_query_tokens in the head's config.json is {stated!r}, but "
            f"'img_adaptor.query' holds {num_query_tokens}: set it to {num_query_tokens}"
        )
    # Early exports have both norms and no flags. Later ones state that they follow the reference
    # (no norms), and may still carry the unused weights. Without a flag the tensors decide.
    has_input_norm = "layers.0.input_layernorm.weight" in shapes
    skip_input_norm = published.flag(text, "draft_skip_first_input_norm", not has_input_norm)
    attention_bias = published.flag(text, "attention_bias", False)
    return HeadConfig(
        target_model_type=str(config.get("model_type", "")).removesuffix("_text"),
        **published.common_fields(text, shapes),
        num_query_tokens=num_query_tokens,
        qkv_bias=published.flag(text, "qkv_bias", attention_bias),
        fc_bias=published.flag(text, "fc_bias", "fc.bias" in shapes),
        layer0_input_norm=not skip_input_norm,
        final_norm=published.flag(text, "draft_apply_final_norm", "norm.weight" in shapes),
    )


def _write_automodel(head: HeadConfig, dtype: str) -> dict[str, Any]:
    return {
        **published.target_like_config(head, dtype),
        "architectures": ["VispecDraftModel"],
        "head_dim": head.head_dim,
        "draft_num_hidden_layers": 1,
        "vispec_num_query_tokens": head.num_query_tokens,
        "fc_bias": head.fc_bias,
        "draft_skip_first_input_norm": not head.layer0_input_norm,
        "draft_apply_final_norm": head.final_norm,
    }


AUTOMODEL = CheckpointFormat(
    name="automodel",
    summary="NeMo Automodel exports (img_adaptor.*, vispec_num_query_tokens)",
    keys=_PUBLISHED_KEYS | {"img_adaptor.*": "img_adaptor.*", "norm.weight": "norm.weight"},
    detect=_is_automodel,
    read_config=_read_automodel,
    write_config=_write_automodel,
    fixed={"compress": True, "compressor": QUERY, "global_feature": True},
    ignored=("*.rotary_emb.*",),
    switched_off=("layer.input_layernorm.weight", "norm.weight"),
)


def _read_reference(config: RawConfig, shapes: Shapes) -> HeadConfig:
    # The config is a copy of the target's. Its architecture and model_type name the target; what
    # it does not say about the draft follows from the tensors or from the reference's code
    # (docs/reference-semantics.md, 4.6 and 4.13).
    text = published.text_fields(config)
    return HeadConfig(
        target_model_type=str(config.get("model_type", "")),
        **published.common_fields(text, shapes),
        num_query_tokens=published.query_tokens(shapes, "imadpt.q"),
        qkv_bias=published.flag(text, "qkv_bias", False),
        fc_bias=published.flag(text, "bias", True),
        layer0_input_norm=False,
        final_norm=False,
    )


REFERENCE = CheckpointFormat(
    name="reference",
    summary="published heads of KangJialiang/ViSpec (imadpt.*, no input norm, no final norm)",
    keys=_PUBLISHED_KEYS | {"imadpt.q": "img_adaptor.query", "imadpt.*": "img_adaptor.*"},
    detect=lambda config, shapes: any(name.startswith("imadpt.") for name in shapes),
    read_config=_read_reference,
    # The number of queries is in the shape of `imadpt.q` only.
    write_config=lambda head, dtype: {
        **published.target_like_config(head, dtype),
        "bias": head.fc_bias,
    },
    fixed={
        "compress": True,
        "compressor": QUERY,
        "global_feature": True,
        "layer0_input_norm": False,
        "final_norm": False,
    },
    ignored=("*.rotary_emb.*",),
)

# Detection asks in this order: the most explicit format first.
FORMATS = {one.name: one for one in (CANONICAL, AUTOMODEL, REFERENCE)}


def get_format(name: str) -> CheckpointFormat:
    """Look a format up by name.

    Raises:
        ViSpecError: there is none of that name; lists the known ones.
    """
    if name not in FORMATS:
        raise ViSpecError(f"unknown checkpoint format {name!r}: use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def detect_format(config: RawConfig, shapes: Shapes) -> CheckpointFormat | None:
    """Return the format of a head, None if it is of no known one."""
    return next((one for one in FORMATS.values() if one.detect(config, shapes)), None)


def describe_other_model(config: RawConfig, shapes: Shapes) -> str | None:
    """Say what weights are that are no ViSpec head, and what to do with them; None if unknown."""
    architectures = " ".join(str(name) for name in config.get("architectures") or ())
    layers = {name.split(".layers.")[1].split(".")[0] for name in shapes if ".layers." in name}
    eagle3_tensors = {"d2t", "t2d", "midlayer.input_layernorm.weight"}
    if "Eagle3" in architectures or eagle3_tensors & shapes.keys():
        return 'an EAGLE-3 head, serve it with "method":"eagle3"'
    if "speculators_model_type" in config or "speculators_config" in config:
        return "a head in the speculators format, serve it with vLLM alone"
    if "Medusa" in architectures or "medusa_num_heads" in config:
        return 'a Medusa head, which vLLM serves with "method":"medusa"'
    if len(layers) >= 4:
        return "a whole model and no draft head, give the head's folder"
    if "fc.weight" in shapes and any(name.startswith("layers.0.") for name in shapes):
        return 'a text-only EAGLE head (no image adaptor), serve it with "method":"eagle"'
    return None

"""Checkpoint formats: the ways in which training codes write a ViSpec head.

A format is a table that maps its tensor names to ours, a function that recognises a folder, and one
that turns its config.json into a `HeadConfig`. To add one, write it like `REFERENCE` below and list
it in `FORMATS`. The config.json of published heads is a copy of the target's, which the draft
resembles.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from vllm_vispec.compressors.spec import IDENTITY, QUERY
from vllm_vispec.heads.config import ARCHITECTURES, LLAMA_FIELDS, HeadConfig
from vllm_vispec.utils.errors import ViSpecError

Shapes = Mapping[str, tuple[int, ...]]
RawConfig = Mapping[str, Any]


@dataclass(frozen=True)
class CheckpointFormat:
    """One layout of config.json and tensor names.

    Attributes:
        name: as in logs, errors and `vispec convert --format`.
        summary: one line for users.
        keys: templates "their name" -> "our name"; a trailing `*` stands for the rest of the name.
            The first template that matches wins.
        detect: says whether a folder with this config.json and these tensors is of the format, or
            may be, if `is_named`.
        read_config: makes the `HeadConfig`; raises `ViSpecError` on impossible values.
        write_config: makes the config.json of a head, given the dtype of its weights; None: heads
            of the format are only read.
        ignored: patterns of tensor names that carry nothing we need.
        switched_off: canonical names that may be present although the flags do not use them.
        is_named: no folder tells it from other formats, so that the user says which it is.
    """

    name: str
    summary: str
    keys: Mapping[str, str]
    detect: Callable[[RawConfig, Shapes], bool]
    read_config: Callable[[RawConfig, Shapes], HeadConfig]
    write_config: Callable[[HeadConfig, str], dict[str, Any]] | None = None
    ignored: tuple[str, ...] = ()
    switched_off: tuple[str, ...] = ()
    is_named: bool = False

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

    def write_checked_config(self, head: HeadConfig, dtype: str, shapes: Shapes) -> dict[str, Any]:
        """Return the config.json of a head, which must be read as the same head.

        Args:
            dtype: of the weights, e.g. "bfloat16".
            shapes: of the head's tensors, by our names.

        Raises:
            ViSpecError: the format cannot express the head; names what would be lost.
        """
        if self.write_config is None:
            raise ViSpecError(f"the {self.name} format is only read: use the canonical format")
        content = self.write_config(head, dtype)
        theirs = {self.source_name(name): shape for name, shape in shapes.items()}
        try:
            found = asdict(self.read_config(content, theirs))
            lost = [f"{name}={old!r}" for name, old in asdict(head).items() if found[name] != old]
            what = ", ".join(lost)
        except ViSpecError as error:
            what = f"this head ({error})"
        if what:
            raise ViSpecError(
                f"the {self.name} format cannot express {what}: use the canonical format"
            )
        return content


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


_OUR_NAMES = (
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
CANONICAL = CheckpointFormat(
    name="canonical",
    summary="folders written by `vispec convert` and by our training",
    keys={name: name for name in _OUR_NAMES},
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
_ROPE_BUFFERS = ("*.rotary_emb.*",)


def _is_automodel(config: RawConfig, shapes: Shapes) -> bool:
    architectures = config.get("architectures") or ()
    return "VispecDraftModel" in architectures or any(n.startswith("img_adaptor.") for n in shapes)


def _read_automodel(config: RawConfig, shapes: Shapes) -> HeadConfig:
    text = text_fields(config)
    num_query_tokens = _query_tokens(shapes, "img_adaptor.query")
    stated = text.get("vispec_num_query_tokens", num_query_tokens)
    if stated != num_query_tokens:
        raise ViSpecError(
            f"vispec_num_query_tokens in the head's config.json is {stated!r}, but "
            f"'img_adaptor.query' holds {num_query_tokens}: set it to {num_query_tokens}"
        )
    # Early exports have both norms and no flags. Later ones state that they follow the reference
    # (no norms), and may still carry the unused weights. Without a flag the tensors decide.
    has_input_norm = "layers.0.input_layernorm.weight" in shapes
    return HeadConfig(
        target_model_type=str(config.get("model_type", "")).removesuffix("_text"),
        **_common_fields(text, shapes),
        num_query_tokens=num_query_tokens,
        qkv_bias=_flag(text, "qkv_bias", _flag(text, "attention_bias", False)),
        fc_bias=_flag(text, "fc_bias", "fc.bias" in shapes),
        layer0_input_norm=not _flag(text, "draft_skip_first_input_norm", not has_input_norm),
        final_norm=_flag(text, "draft_apply_final_norm", "norm.weight" in shapes),
    )


def _write_automodel(head: HeadConfig, dtype: str) -> dict[str, Any]:
    return {
        **_target_like_config(head, dtype),
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
    ignored=_ROPE_BUFFERS,
    switched_off=("layer.input_layernorm.weight", "norm.weight"),
)


def _read_reference(config: RawConfig, shapes: Shapes) -> HeadConfig:
    # Architecture and model_type name the target; what the config does not say about the draft
    # follows from the tensors or the reference's code (docs/reference-semantics.md, 4.6 and 4.13).
    text = text_fields(config)
    return HeadConfig(
        target_model_type=str(config.get("model_type", "")),
        **_common_fields(text, shapes),
        num_query_tokens=_query_tokens(shapes, "imadpt.q"),
        qkv_bias=_flag(text, "qkv_bias", False),
        fc_bias=_flag(text, "bias", True),
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
    write_config=lambda head, dtype: _target_like_config(head, dtype) | {"bias": head.fc_bias},
    ignored=_ROPE_BUFFERS,
)


def _is_eagle_layout(names: Collection[str]) -> bool:
    return "fc.weight" in names and any(name.startswith("layers.0.") for name in names)


def _read_eagle(config: RawConfig, shapes: Shapes, **image_flags: Any) -> HeadConfig:
    # What the codes of EAGLE-1 and MSD leave to their classes, the tensors tell.
    return HeadConfig(
        target_model_type=str(config.get("model_type", "")),
        **_common_fields(text_fields(config), shapes),
        num_query_tokens=1,
        qkv_bias="layers.0.self_attn.q_proj.bias" in shapes,
        fc_bias="fc.bias" in shapes,
        layer0_input_norm="layers.0.input_layernorm.weight" in shapes,
        final_norm=False,
        global_feature=False,
        **image_flags,
    )


def _eagle_layout(name: str, summary: str, **image_flags: Any) -> CheckpointFormat:
    """Return a format with EAGLE-1's tensors, which do not tell what becomes of image rows."""
    return CheckpointFormat(
        name=name,
        summary=summary,
        keys=_PUBLISHED_KEYS,
        detect=lambda config, shapes: _is_eagle_layout(shapes),
        read_config=partial(_read_eagle, **image_flags),
        write_config=lambda head, dtype: _target_like_config(head, dtype),
        ignored=_ROPE_BUFFERS,
        is_named=True,
    )


EAGLE = _eagle_layout(
    "eagle",
    "EAGLE-1 and EAGLE-2 heads; image rows are fused as text rows are",
    compress=False,
    compressor=QUERY,
)
MSD = _eagle_layout(
    "msd",
    "heads of Lyn-Lucy/MSD; image rows are the image's embeddings alone",
    compress=True,
    compressor=IDENTITY,
)

_LAYERS_OF_A_MODEL = 4
_EAGLE3_TENSORS = frozenset({"d2t", "t2d", "midlayer.input_layernorm.weight"})

# Detection asks in this order: the most explicit format first.
FORMATS = {one.name: one for one in (CANONICAL, AUTOMODEL, REFERENCE, EAGLE, MSD)}
NAMED_FORMATS = tuple(one.name for one in FORMATS.values() if one.is_named)


def get_format(name: str) -> CheckpointFormat:
    """Look a format up by name.

    Raises:
        ViSpecError: there is none of that name; lists the known ones.
    """
    if name not in FORMATS:
        raise ViSpecError(f"unknown checkpoint format {name!r}: use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def detect_format(
    config: RawConfig, shapes: Shapes, named: str | None = None
) -> CheckpointFormat | None:
    """Return the format of a head, None if it is of no known one.

    Args:
        named: one of `NAMED_FORMATS`, as the user says; None: the folder tells.

    Raises:
        ViSpecError: the head is not of the named format.
    """
    told = (one for one in FORMATS.values() if not one.is_named)
    found = next((one for one in told if one.detect(config, shapes)), None)
    if named is None:
        return found
    if named not in NAMED_FORMATS:
        raise ViSpecError(
            f"checkpoint_format={named!r} is not one to be named: use {' or '.join(NAMED_FORMATS)}"
            ", or leave it out, the folder tells"
        )
    if found is not None or not FORMATS[named].detect(config, shapes):
        what = f"of the {found.name} format" if found else "no EAGLE head (fc.*, layers.0.*)"
        raise ViSpecError(f"checkpoint_format={named!r}, but the head is {what}: leave it out")
    return FORMATS[named]


def describe_other_draft(config: RawConfig, names: Collection[str]) -> str | None:
    """Say which other kind of draft head weights are, and how to serve it; None if they are none.

    Args:
        config: The config.json.
        names: Of the tensors.
    """
    architectures = " ".join(str(name) for name in config.get("architectures") or ())
    if "Eagle3" in architectures or not _EAGLE3_TENSORS.isdisjoint(names):
        return 'an EAGLE-3 head, serve it with "method":"eagle3"'
    if "speculators_model_type" in config or "speculators_config" in config:
        return "a head in the speculators format, serve it with vLLM alone"
    if "Medusa" in architectures or "medusa_num_heads" in config:
        return 'a Medusa head, which vLLM serves with "method":"medusa"'
    if _is_eagle_layout(names):
        return (
            'a head without image adaptor: add "checkpoint_format":"msd" for an MSD head, "eagle" '
            "for an EAGLE head that sees images (vispec convert: --from), or serve a text-only one "
            'with "method":"eagle"'
        )
    return None


def describe_other_model(config: RawConfig, shapes: Shapes) -> str | None:
    """Say what weights are that are no ViSpec head, and what to do with them; None if unknown."""
    layers = {name.split(".layers.")[1].split(".")[0] for name in shapes if ".layers." in name}
    classes = ", ".join(str(name) for name in config.get("architectures") or ())
    whole = f"a whole model ({classes})" if len(layers) >= _LAYERS_OF_A_MODEL else None
    return describe_other_draft(config, shapes) or whole


def text_fields(config: RawConfig) -> dict[str, Any]:
    """Return the text model's fields, whether they are flat or under `text_config`.

    `model_type` stays that of the whole config: it names the target.
    """
    nested = config.get("text_config")
    merged = dict(config)
    if isinstance(nested, Mapping):
        merged |= {k: v for k, v in nested.items() if k not in ("model_type", "architectures")}
    return merged


def _common_fields(config: RawConfig, shapes: Shapes) -> dict[str, Any]:
    """Return the fields of `HeadConfig` that all published formats state alike."""
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ViSpecError(
            f"hidden_act of the head is {activation!r}: only 'silu' is supported, train the head "
            "with it"
        )
    heads = _integer(config, "num_attention_heads")
    hidden = _integer(config, "hidden_size")
    # Configs copied from a target sometimes miss the padding rows of its embedding table.
    table = shapes.get("embed_tokens.weight")
    return {
        "hidden_size": hidden,
        "intermediate_size": _integer(config, "intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": _integer(config, "num_key_value_heads", heads),
        "head_dim": _integer(config, "head_dim", hidden // heads),
        "vocab_size": table[0] if table else _integer(config, "vocab_size"),
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "rope_theta": _rope_theta(config),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "has_embed_tokens": table is not None,
    }


def _target_like_config(head: HeadConfig, dtype: str) -> dict[str, Any]:
    """Return a flat config.json of one layer in the style of the target's."""
    from transformers.models.auto import modeling_auto

    config: dict[str, Any] = {
        "model_type": head.target_model_type,
        **{name: getattr(head, name) for name in (*LLAMA_FIELDS, "rope_theta", "qkv_bias")},
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    classes = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if head.target_model_type in classes:
        config["architectures"] = [classes[head.target_model_type]]
    if head.head_dim * head.num_attention_heads == head.hidden_size:
        del config["head_dim"]
    return config


def _flag(config: RawConfig, name: str, default: bool) -> bool:
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ViSpecError(f"{name} in the head's config.json is {value!r}: set it to true or false")
    return value


def _integer(config: RawConfig, name: str, default: int | None = None) -> int:
    """Return an integer of at least 1; needed before `HeadConfig` can check it."""
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise ViSpecError(
            f"config.json of the head lacks {name!r}: copy it from the config the head was "
            "trained with"
        )
    if type(value) is not int or value < 1:
        raise ViSpecError(
            f"{name} in the head's config.json is {value!r}, it must be an integer of at least "
            "1: correct the head's config.json"
        )
    return value


def _query_tokens(shapes: Shapes, name: str) -> int:
    """Return the number of queries: the first of the sizes [queries, heads, head_dim] of a tensor.

    Raises:
        ViSpecError: the tensor is missing or not three-dimensional.
    """
    shape = shapes.get(name)
    if shape is None:
        raise ViSpecError(
            f"the head lacks tensor {name!r}, whose shape gives the number of query tokens: "
            "download or export the head again"
        )
    if len(shape) != 3 or shape[0] < 1:
        raise ViSpecError(
            f"tensor {name!r} of the head has shape {list(shape)}, expected "
            "[query tokens, heads, head_dim] with at least one query token: export the head again"
        )
    return shape[0]


def _rope_theta(config: RawConfig) -> float:
    """Return RoPE's base: in the flat key, or in transformers 5's `rope_parameters`."""
    theta = config.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        section = config.get(key)
        if not isinstance(section, Mapping):
            continue
        kind = section.get("rope_type", section.get("type"))
        if kind not in (None, "default", "mrope"):
            raise ViSpecError(
                f"{key} of the head asks for {kind!r} RoPE: only plain RoPE is supported, "
                f"remove {key} from the head's config.json or train a head without it"
            )
        theta = section.get("rope_theta", theta)
    return 10000.0 if theta is None else theta

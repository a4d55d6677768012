"""Recognising weights that are no ViSpec head, so that the error can say what they are."""

from __future__ import annotations

from collections.abc import Callable

from vllm_vispec.heads.formats.base import RawConfig, Shapes

_MANY_LAYERS = 4


def _architectures(config: RawConfig) -> str:
    found = config.get("architectures") or ()
    return " ".join(str(name) for name in found)


def _is_eagle3(config: RawConfig, shapes: Shapes) -> bool:
    markers = ("d2t", "t2d", "midlayer.input_layernorm.weight")
    return "Eagle3" in _architectures(config) or any(name in shapes for name in markers)


def _is_speculators(config: RawConfig, shapes: Shapes) -> bool:
    return "speculators_model_type" in config or "speculators_config" in config


def _is_full_model(config: RawConfig, shapes: Shapes) -> bool:
    layers = {name.split(".layers.")[1].split(".")[0] for name in shapes if ".layers." in name}
    return len(layers) >= _MANY_LAYERS


def _is_medusa(config: RawConfig, shapes: Shapes) -> bool:
    return "Medusa" in _architectures(config) or "medusa_num_heads" in config


def _is_plain_eagle(config: RawConfig, shapes: Shapes) -> bool:
    return "fc.weight" in shapes and any(name.startswith("layers.0.") for name in shapes)


_FAMILIES: tuple[tuple[str, Callable[[RawConfig, Shapes], bool]], ...] = (
    ('an EAGLE-3 head, serve it with "method":"eagle3"', _is_eagle3),
    ("a head in the speculators format, serve it with vLLM alone", _is_speculators),
    ('a Medusa head, which vLLM serves with "method":"medusa"', _is_medusa),
    ("a whole model and no draft head, give the head's folder", _is_full_model),
    ('a text-only EAGLE head (no image adaptor), serve it with "method":"eagle"', _is_plain_eagle),
)


def describe_family(config: RawConfig, shapes: Shapes) -> str | None:
    """What the weights are and what to do with them, or None if nothing is recognised."""
    for description, matches in _FAMILIES:
        if matches(config, shapes):
            return description
    return None

"""What a head is, in words: its facts, the command that serves it, its model card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm_vispec import __version__
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.folder import PROVENANCE
from vllm_vispec.heads.speculators import Serving

CARD_TITLE = "# ViSpec head"
MODEL_TITLE = "# Draft model"
_MAX_VALUE = 200

# (model_type, hidden_size) -> the public target of that shape.
_KNOWN_TARGETS = {
    ("qwen2_5_vl", 2048): "Qwen/Qwen2.5-VL-3B-Instruct",
    ("qwen2_5_vl", 3584): "Qwen/Qwen2.5-VL-7B-Instruct",
    ("llava", 4096): "llava-hf/llava-1.5-7b-hf",
    ("llava", 5120): "llava-hf/llava-1.5-13b-hf",
    ("llava_next", 4096): "llava-hf/llava-v1.6-vicuna-7b-hf",
    ("llava_next", 5120): "llava-hf/llava-v1.6-vicuna-13b-hf",
}


def guess_target(config: HeadConfig) -> str:
    """Return the public target such a head belongs to, or the placeholder "TARGET"."""
    width = config.vision_size or config.hidden_size
    return _KNOWN_TARGETS.get((config.target_model_type, width), "TARGET")


def trained_bounds(head: Path) -> dict[str, int]:
    """Return the bounds of images that a local head was trained with; none if it does not say."""
    file = head / PROVENANCE
    return _bounds(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None)


def _bounds(provenance: Mapping[str, Any] | None) -> dict[str, int]:
    data = ((provenance or {}).get("config") or {}).get("data") or {}
    return {name: data[name] for name in ("min_pixels", "max_pixels") if data.get(name)}


def with_bounds(command: str, bounds: Mapping[str, int]) -> str:
    """Return a command of vLLM with the bounds of images, by names of Hugging Face processors."""
    if not bounds:
        return command
    return f"{command} --mm-processor-kwargs '{json.dumps(bounds, separators=(',', ':'))}'"


def serve_command(
    head: str | Path, serving: Serving, bounds: Mapping[str, int] = MappingProxyType({})
) -> str:
    """Return the command that serves a target with a head.

    Args:
        bounds: of images, `min_pixels` and `max_pixels`, as in training.
    """
    speculative = {
        "method": "vispec",
        "model": str(head),
        "num_speculative_tokens": serving.num_tokens,
    }
    text = json.dumps(speculative, separators=(",", ":"))
    return with_bounds(f"vllm serve {serving.target} --speculative-config '{text}'", bounds)


def head_facts(config: HeadConfig) -> dict[str, str]:
    """Return what a head is and what it needs of its target, in the order to show it."""
    facts = {
        "target type": config.target_model_type or "not stated",
        "hidden size": f"{config.hidden_size} (the target's must be the same)",
        "vocabulary": f"{config.vocab_size} (the target's must be the same)",
        "kind": f"images compressed {_yes(config.compress)}, "
        f"global feature {_yes(config.global_feature)}",
        "compressor": f"{config.compressor_spec}" if config.compress else "none",
        "query tokens": _queries(config),
        "attention": f"{config.num_attention_heads} heads, {config.num_key_value_heads} KV heads, "
        f"head size {config.head_dim}, RoPE base {config.rope_theta:g}",
        "positions": f"up to {config.max_position_embeddings}",
        "norms": f"input {_yes(config.layer0_input_norm)}, final {_yes(config.final_norm)}",
        "biases": f"q/k/v {_yes(config.qkv_bias)}, fc {_yes(config.fc_bias)}",
        "embeddings": "its own" if config.has_embed_tokens else "the target's",
    }
    if config.is_draft_vlm:
        facts |= {
            "hidden size": f"{config.hidden_size} in {config.num_hidden_layers} layer(s)",
            "kind": f"a draft VLM for image embeddings of {config.vision_size} (the target's "
            "hidden size must be the same)",
            "lm_head": "the embedding table" if config.tie_word_embeddings else "its own",
        }
    return facts


def model_card(
    config: HeadConfig,
    dtype: str,
    serving: Serving,
    folder: str | Path,
    origin: str,
    provenance: Mapping[str, Any] | None,
    *,
    names_target: bool,
) -> str:
    """Return Markdown that says what the head is, where it comes from and how to serve it.

    Args:
        origin: how this folder was made.
        provenance: how the head was trained; None if that is unknown.
        names_target: the head's config.json names its target, so that the folder serves itself.
    """
    bounds = _bounds(provenance)
    commands = [serve_command(folder, serving, bounds)]
    if names_target:
        commands.insert(0, with_bounds(f"vllm serve {folder}", bounds))
    what = (
        "A draft head for speculative decoding of a vision-language model in vLLM (needs "
        "`vllm-vispec`)."
    )
    facts = {"target": serving.target} | head_facts(config) | _made(dtype, origin)
    return _card(CARD_TITLE, what, commands, facts, provenance)


def published_card(
    dtype: str, serving: Serving, folder: str | Path, provenance: Mapping[str, Any]
) -> str:
    """Return the card of a published model that was trained as a draft."""
    what = (
        "A vision-language model that was trained to draft for a larger one in vLLM (needs "
        "`vllm-vispec`). Without a target it is served as what it was trained from."
    )
    facts = {"target": serving.target} | _made(dtype, "trained")
    command = serve_command(folder, serving, _bounds(provenance))
    return _card(MODEL_TITLE, what, [command], facts, provenance)


def _made(dtype: str, origin: str) -> dict[str, str]:
    return {"dtype": dtype, "made by": f"vllm-vispec {__version__}, {origin}"}


def _card(
    title: str,
    what: str,
    commands: Iterable[str],
    facts: Mapping[str, str],
    provenance: Mapping[str, Any] | None,
) -> str:
    shown = "\n\nor\n\n".join(f"    {command}" for command in commands)
    sections = [title, what, shown, _table(facts)]
    if provenance is not None:
        sections += ["## Training", _table(dict(_flat(provenance)))]
    return "\n\n".join(sections) + "\n"


def _queries(config: HeadConfig) -> str:
    if not config.has_adaptor:
        return "no image adaptor"
    if config.rows_per_image is None:
        return f"{config.num_query_tokens}, the last for the global feature"
    rows = config.rows_per_image
    return f"{config.num_query_tokens} ({rows} row{'s' * (rows != 1)} per image)"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as one level of dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    """One line of text that cannot end a table cell."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 3] + "..."

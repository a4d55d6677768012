"""The model card of a head, and the commands that serve it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_vispec import __version__
from vllm_vispec.heads.config import HeadConfig

CARD_TITLE = "# ViSpec head"
DEFAULT_NUM_TOKENS = 4
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


def serve_command(target: str, head: str | Path, num_tokens: int = DEFAULT_NUM_TOKENS) -> str:
    """Return the command that serves a target with a head."""
    speculative = json.dumps(
        {"method": "vispec", "model": str(head), "num_speculative_tokens": num_tokens},
        separators=(",", ":"),
    )
    return f"vllm serve {target} --speculative-config '{speculative}'"


def model_card(
    config: HeadConfig,
    dtype: str,
    target: str,
    folder: Path,
    *,
    num_tokens: int = DEFAULT_NUM_TOKENS,
    names_target: bool = False,
    origin: str = "trained",
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """Return Markdown that says what the head is, where it comes from and how to serve it.

    Args:
        names_target: the head's config.json names its target, so that the folder serves itself.
        origin: how this folder was made.
        provenance: how the head was trained; None if that is unknown.
    """
    commands = [serve_command(target, folder, num_tokens)]
    if names_target:
        commands.insert(0, f"vllm serve {folder}")
    sections = [
        CARD_TITLE,
        "A draft head for speculative decoding of a vision-language model in vLLM (needs "
        "`vllm-vispec`).",
        "\n\nor\n\n".join(f"    {command}" for command in commands),
        _table(_facts(config, dtype, target, origin)),
    ]
    if provenance is not None:
        sections += ["## Training", _table(dict(_flat(provenance)))]
    return "\n\n".join(sections) + "\n"


def _facts(config: HeadConfig, dtype: str, target: str, origin: str) -> dict[str, Any]:
    queries = f"{config.num_query_tokens}"
    if config.rows_per_image is not None:
        queries += f" ({config.rows_per_image} draft rows per image)"
    draft_vlm = {
        "kind": "draft VLM: a model of its own, which reads no target states",
        "decoder layers": config.num_hidden_layers,
        "image embeddings": f"{config.vision_size} wide, projected",
        "lm_head": "the embedding table" if config.tie_word_embeddings else "its own",
    }
    return {
        "target": target,
        "target type": config.target_model_type or "not stated",
        "hidden size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "images": "compressed" if config.compress else "every image token keeps its row",
        **(draft_vlm if config.is_draft_vlm else {}),
        **({"compressor": config.compressor_spec} if config.has_compressor else {}),
        "global feature": config.global_feature,
        "query tokens": queries if config.has_adaptor else "none, no image adaptor",
        "layer input norm / final norm": f"{config.layer0_input_norm} / {config.final_norm}",
        "own embedding table": config.has_embed_tokens,
        "dtype": dtype,
        "made by": f"vllm-vispec {__version__}, {origin}",
    }


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

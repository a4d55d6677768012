"""A small Hugging Face language model as the start of a draft VLM (MASSV, arXiv 2505.10526).

The draft takes over its decoder, tables and norm. Only the projector is new.

Tensor names end in their shape: V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from vllm_vispec.heads.folder import read_json, short_list, weight_files
from vllm_vispec.heads.location import resolve_head
from vllm_vispec.reference.modeling_draft_vlm import PROJECTOR_PREFIX
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import read_tensors

# model_type -> whether q/k/v have biases.
FAMILIES: Mapping[str, bool] = {"qwen2": True, "llama": False}
# Models of one tokenizer pad their tables to different numbers of rows.
_PADDING = 512
_TABLES = ("embed_tokens.weight", "lm_head.weight")
# Values of config.json under which the architecture is the draft's.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "max_position_embeddings",
    "rms_norm_eps",
)


def is_language_model(folder: str | Path) -> bool:
    """Whether a folder holds a whole Hugging Face language model, not a head."""
    config = read_json(resolve_head(folder) / "config.json")
    names = config.get("architectures") or ()
    return "vispec" not in config and any(str(one).endswith("ForCausalLM") for one in names)


def read_language_model(
    folder: str | Path, vocab_size: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a language model.

    Args:
        vocab_size: the target's.

    Returns:
        All fields of `HeadConfig` that it decides, and its weights under our names.

    Raises:
        ViSpecError: its architecture or vocabulary is not one a draft VLM can have.
    """
    path = resolve_head(folder)
    config = read_json(path / "config.json")
    where = f"head.init_from {str(path)!r} ({config.get('model_type')})"
    _check_architecture(where, config, vocab_size)
    tensors = {
        name.removeprefix("model."): tensor
        for file in weight_files(path)
        for name, tensor in read_tensors(file).items()
    }
    tied = bool(config.get("tie_word_embeddings", False))
    if tied:
        tensors.pop("lm_head.weight", None)  # some writers store the table twice
    heads = config["num_attention_heads"]
    fields = {
        **{name: config[name] for name in _SIZES},
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "rope_theta": _rope_theta(where, config),
        "qkv_bias": FAMILIES[config["model_type"]],
        "tie_word_embeddings": tied,
    }
    return fields, tensors


def load_language_model(draft: nn.Module, tensors: Mapping[str, Tensor], folder: str) -> None:
    """Copy the weights into a draft VLM of this shape; the projector stays as it is.

    Raises:
        ViSpecError: tensors are missing, left over or of other shapes.
    """
    ours = draft.state_dict()
    weights = {n: w for n, w in ours.items() if n.startswith(PROJECTOR_PREFIX)}
    for name, tensor in tensors.items():
        if name in _TABLES and name in ours and abs(len(tensor) - len(ours[name])) <= _PADDING:
            tensor = _with_rows(tensor, len(ours[name]))
        weights[name] = tensor
    try:
        draft.load_state_dict(weights)
    except RuntimeError as error:
        reason = shorten(str(error).splitlines()[1], 300, placeholder=" ...")
        raise ViSpecError(
            f"head.init_from {folder!r} is a language model, but not the one of its config.json "
            f"({reason}): use a plain, unquantised {' or '.join(FAMILIES)} model"
        ) from error


def _check_architecture(where: str, config: Mapping[str, Any], vocab_size: int) -> None:
    if config.get("model_type") not in FAMILIES:
        raise ViSpecError(
            f"{where} is a language model that no draft VLM starts from: use one of "
            f"{', '.join(FAMILIES)}"
        )
    missing = [name for name in (*_SIZES, "vocab_size") if name not in config]
    if missing:
        raise ViSpecError(
            f"{where} lacks {short_list(missing)} in config.json: give a complete model"
        )
    for name, allowed in _FIXED.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ViSpecError(
                f"{where} has {name}={config[name]!r}, a draft VLM knows {allowed[0]!r} only: "
                "start from another model"
            )
    theirs = config["vocab_size"]
    if abs(theirs - vocab_size) > _PADDING:
        raise ViSpecError(
            f"{where} has a vocabulary of {theirs} tokens, the target of {vocab_size}: start from "
            "a small model of the target's own family, with its tokenizer"
        )


def _rope_theta(where: str, config: Mapping[str, Any]) -> float:
    """The base of plain RoPE, as transformers 5 or an earlier version writes it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise ViSpecError(
            f"{where} scales RoPE ({scaling}), a draft VLM uses it plain: start from another model"
        )
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)


def _with_rows(tensor: Tensor, rows: int) -> Tensor:
    """A table with this many rows: padding is cut off, or filled with the mean row.

    The mean row's logit is the mean logit, so a token without a row of its own is never drafted.
    """
    missing = rows - len(tensor)
    if missing <= 0:
        return tensor[:rows]
    mean_1D = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat((tensor, mean_1D.expand(missing, *tensor.shape[1:])))

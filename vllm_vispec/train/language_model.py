"""A small Hugging Face language model as the start of a draft VLM (MASSV, arXiv 2505.10526).

Its decoder, tables and norm are taken over; the projector is what it lacks.

Tensor names end in their shape: V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.folder import TensorEntry, read_entries, read_json, short_list, weight_files
from vllm_vispec.heads.location import resolve_head
from vllm_vispec.reference import tensor_shapes
from vllm_vispec.reference.modeling_draft_vlm import PROJECTOR_PREFIX
from vllm_vispec.utils.errors import ViSpecError

# model_type -> whether q/k/v have biases.
FAMILIES: Mapping[str, bool] = {"qwen2": True, "llama": False}
# Models of one tokenizer pad their tables to different numbers of rows.
_PADDING = 512
# Values of config.json under which the architecture is the draft's.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
}


@dataclass(frozen=True)
class LanguageModel:
    """A language model that a draft VLM can start from.

    Attributes:
        folder: where it lies.
        model_type: a name in `FAMILIES`.
        fields: of `HeadConfig`, all that it decides.
        entries: our name -> (its name, where the tensor lies).
    """

    folder: Path
    model_type: str
    fields: Mapping[str, Any]
    entries: Mapping[str, tuple[str, TensorEntry]]

    def load_into(self, draft: torch.nn.Module, config: HeadConfig) -> None:
        """Copy its weights into a draft VLM of this configuration; the projector stays as it is.

        Raises:
            ViSpecError: tensors are missing, left over or of other shapes.
        """
        wanted = {
            name: shape
            for name, shape in tensor_shapes(config).items()
            if not name.startswith(PROJECTOR_PREFIX)
        }
        self._check(wanted)
        weights = draft.state_dict()
        for name, tensor in self._tensors():
            with torch.no_grad():
                weights[name].copy_(_to_rows(tensor, wanted[name][0]))

    def _check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        missing = sorted(set(wanted) - set(self.entries))
        extra = sorted(set(self.entries) - set(wanted))
        # Only the number of a table's rows may differ.
        other = [
            name
            for name in set(wanted) & set(self.entries)
            if not _fits(self.entries[name][1].shape, wanted[name])
        ]
        for what, names in (("lacks", missing), ("has no use for", extra), ("misshapes", other)):
            if names:
                raise ViSpecError(
                    f"head.init_from {str(self.folder)!r} is a {self.model_type} language model, "
                    f"but a draft VLM of its config.json {what} {short_list(sorted(names))}: use "
                    f"a plain, unquantised {' or '.join(FAMILIES)} model"
                )

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        from safetensors import safe_open

        ordered = sorted(self.entries.items(), key=lambda item: str(item[1][1].file))
        for file, group in groupby(ordered, key=lambda item: item[1][1].file):
            with safe_open(str(file), framework="pt") as weights:
                for name, (theirs, _) in group:
                    yield name, weights.get_tensor(theirs)


def is_language_model(folder: str | Path) -> bool:
    """Whether a folder holds a whole Hugging Face language model, not a head."""
    config = read_json(resolve_head(folder) / "config.json")
    names = config.get("architectures") or ()
    return "vispec" not in config and any(str(one).endswith("ForCausalLM") for one in names)


def read_language_model(folder: str | Path, vocab_size: int) -> LanguageModel:
    """Look at a language model: config.json and safetensors headers.

    Args:
        vocab_size: the target's.

    Raises:
        ViSpecError: its architecture or vocabulary is not one a draft VLM can have.
    """
    path = resolve_head(folder)
    config = read_json(path / "config.json")
    _check_architecture(path, config, vocab_size)
    entries = {_our_name(name): (name, e) for name, e in read_entries(weight_files(path)).items()}
    tied = bool(config.get("tie_word_embeddings", False))
    if tied:
        entries.pop("lm_head.weight", None)  # some writers store the table twice
    heads = config["num_attention_heads"]
    fields = {
        **{name: config[name] for name in _SIZES},
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "rope_theta": _rope_theta(path, config),
        "qkv_bias": FAMILIES[config["model_type"]],
        "tie_word_embeddings": tied,
    }
    return LanguageModel(path, str(config["model_type"]), fields, entries)


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "max_position_embeddings",
    "rms_norm_eps",
)


def _check_architecture(folder: Path, config: Mapping[str, Any], vocab_size: int) -> None:
    where = f"head.init_from {str(folder)!r} ({config.get('model_type')})"
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


def _rope_theta(folder: Path, config: Mapping[str, Any]) -> float:
    """The base of plain RoPE, in the way of transformers 5 or of earlier ones."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ViSpecError(
            f"head.init_from {str(folder)!r} scales RoPE ({kind}), a draft VLM uses it plain: "
            "start from another model"
        )
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)


def _our_name(theirs: str) -> str:
    return theirs.removeprefix("model.")


def _fits(theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    is_table = len(ours) == 2 and abs(theirs[0] - ours[0]) <= _PADDING
    return theirs == ours or (is_table and theirs[1:] == ours[1:])


def _to_rows(tensor: Tensor, rows: int) -> Tensor:
    """A table with so many rows: padding is cut off, or filled with the mean row.

    The mean row's logit is the mean logit, so a token without a row of its own is never drafted.
    """
    missing = rows - len(tensor)
    if missing <= 0:
        return tensor[:rows]
    mean_1D = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat((tensor, mean_1D.expand(missing, *tensor.shape[1:])))

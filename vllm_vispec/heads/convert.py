"""Writing a head of any dialect in ours, and back in those that were published."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_vispec.draft_vocab.files import DRAFT_VOCAB, DRAFT_VOCAB_FACTS
from vllm_vispec.heads.card import DEFAULT_NUM_TOKENS, guess_target, model_card, serve_command
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.files import resolve_head
from vllm_vispec.heads.folder import (
    CARD,
    CONFIG,
    PROVENANCE,
    check_dtype,
    new_head_folder,
    write_json,
    write_weights,
)
from vllm_vispec.heads.formats.base import Dialect, get_dialect
from vllm_vispec.heads.load import HeadInfo, inspect_head, iter_canonical_tensors
from vllm_vispec.heads.speculators import (
    Serving,
    locate_target,
    serving_of_folder,
    speculators_fields,
)
from vllm_vispec.utils.errors import ViSpecError

__all__ = ["convert_head", "guess_target", "serve_command"]

_STORED_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def convert_head(
    source: str | Path,
    destination: str | Path,
    *,
    dialect: str = "canonical",
    dtype: str | None = None,
    target: str | None = None,
    drop_embed_tokens: bool = False,
    overwrite: bool = False,
) -> HeadInfo:
    """Write `source` (a folder or hub id of any dialect) as a folder of `dialect`.

    The folder appears whole or not at all: it is written beside the destination and renamed.

    Args:
        dialect: canonical, or a published one, to use a head with its authors' tools.
        dtype: float32, float16 or bfloat16; None keeps the stored one.
        target: hub id or folder. Named in the model card and, in a canonical folder, in
            config.json, so that `vllm serve FOLDER` finds it. None = as the source says, else the
            card's is guessed from the head's sizes.
        drop_embed_tokens: leave the embedding table out, vLLM then uses the target's.
        overwrite: replace an empty folder or one written here.

    Returns:
        What `inspect_head` says about the folder written.

    Raises:
        ViSpecError: the source is no usable head, the dialect cannot express it, or the
            destination is taken.
    """
    if dtype is not None:
        check_dtype(dtype, "--dtype")
    writer = get_dialect(dialect)
    info = inspect_head(resolve_head(source))
    shown = Path(destination)  # in the card: no path of this machine that the user did not write
    destination = shown.expanduser().absolute()
    config = info.config
    if drop_embed_tokens:
        config = replace(config, has_embed_tokens=False)
    writer.check_expressible(config)
    stored = dtype or _STORED_DTYPES[info.dtype]
    with new_head_folder(destination, overwrite=overwrite, source=info.folder) as scratch:
        _write_weights(info, config, writer, stored, scratch)
        _write_texts(info, config, writer, stored, target, shown, scratch)
        _check_same(writer, config, scratch)
    return inspect_head(destination)


def _write_weights(
    info: HeadInfo, config: HeadConfig, writer: Dialect, dtype: str, folder: Path
) -> None:
    wanted = config.tensor_shapes()
    tensors = (
        (writer.source_name(name), tensor)
        for name, tensor in iter_canonical_tensors(info.folder)
        if name in wanted
    )
    write_weights(folder, tensors, dtype)


def _write_texts(
    info: HeadInfo,
    config: HeadConfig,
    writer: Dialect,
    dtype: str,
    target: str | None,
    destination: Path,
    folder: Path,
) -> None:
    serving = _serving(info, target)
    content: dict[str, Any] = writer.write_config(config, dtype)
    num_tokens = serving.num_tokens if serving else DEFAULT_NUM_TOKENS
    names_target = serving is not None and writer.name == "canonical"
    if serving is not None and names_target:
        placed = destination.expanduser().absolute()
        content |= speculators_fields(config, serving.target, placed, num_tokens)
    write_json(folder / CONFIG, content)
    made = info.folder / PROVENANCE
    for name in (PROVENANCE, DRAFT_VOCAB, DRAFT_VOCAB_FACTS):
        if (info.folder / name).is_file():
            shutil.copyfile(info.folder / name, folder / name)
    card = model_card(
        config,
        dtype,
        serving.target if serving else guess_target(config),
        destination,
        num_tokens=num_tokens,
        names_target=names_target,
        provenance=json.loads(made.read_text(encoding="utf-8")) if made.is_file() else None,
    )
    (folder / CARD).write_text(card, encoding="utf-8")


def _serving(info: HeadInfo, target: str | None) -> Serving | None:
    """The target that was given, else the one the source names."""
    stated = serving_of_folder(info.folder)
    if target is not None:
        return Serving(target, stated.num_tokens if stated else DEFAULT_NUM_TOKENS)
    if stated is None:
        return None
    return replace(stated, target=locate_target(stated.target, info.folder))


def _check_same(writer: Dialect, config: HeadConfig, folder: Path) -> None:
    """What was written is read as the same head."""
    found, wanted = inspect_head(folder).config.as_dict(), config.as_dict()
    lost = [name for name in wanted if name != "dialect" and found[name] != wanted[name]]
    if lost:
        pairs = ", ".join(f"{name}={wanted[name]!r}" for name in lost)
        raise ViSpecError(
            f"the {writer.name} dialect cannot express {pairs}: use the canonical dialect"
        )

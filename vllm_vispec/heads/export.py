"""From a trained draft to a folder that `vllm serve` takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_vispec.heads.card import model_card
from vllm_vispec.heads.folder import (
    CARD,
    CONFIG,
    PROVENANCE,
    check_dtype,
    new_head_folder,
    write_json,
    write_weights,
)
from vllm_vispec.heads.load import HeadInfo, inspect_head
from vllm_vispec.heads.speculators import speculators_fields
from vllm_vispec.utils.errors import ViSpecError

if TYPE_CHECKING:
    from vllm_vispec.reference import Draft

MAX_DRAFT_TOKENS = 32


def export_head(
    draft: Draft,
    folder: Path,
    *,
    target: str,
    dtype: str,
    num_speculative_tokens: int,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
) -> HeadInfo:
    """Write a trained draft of any kind as a canonical folder.

    It holds model.safetensors, config.json (explicit flags, and the speculators format's fields,
    by which `vllm serve FOLDER` finds the target), provenance.json and a model card, README.md.
    The folder appears whole or not at all.

    Args:
        folder: where the head will lie.
        target: the target's hub id or folder. A relative folder is stored relative to the head's,
            so that both may move together.
        dtype: float32, float16 or bfloat16.
        num_speculative_tokens: draft tokens per round, unless the server is told otherwise.
        provenance: how the head was made; values JSON does not know are written as text.
        overwrite: replace an empty folder or a head written earlier.

    Returns:
        What `inspect_head` says about the folder written.

    Raises:
        ViSpecError: a setting is impossible, the folder is taken or cannot be written, or the
            target is a path to nothing.
    """
    check_dtype(dtype)
    count = num_speculative_tokens
    if not 1 <= count <= MAX_DRAFT_TOKENS:
        raise ViSpecError(
            f"num_speculative_tokens={count} must lie between 1 and {MAX_DRAFT_TOKENS}"
        )
    shown = Path(folder)  # in the card: no path of this machine that the user did not write
    folder = shown.expanduser().absolute()
    config = draft.config.with_dialect("canonical")
    fields = speculators_fields(config, target, folder, count)
    card = model_card(
        config,
        dtype,
        target,
        shown,
        num_tokens=count,
        names_target=True,
        provenance=provenance,
    )
    with new_head_folder(folder, overwrite=overwrite) as scratch:
        write_weights(scratch, draft.state_dict().items(), dtype)
        write_json(scratch / CONFIG, config.to_config_json(dtype) | fields)
        write_json(scratch / PROVENANCE, provenance)
        (scratch / CARD).write_text(card, encoding="utf-8")
    return inspect_head(folder)

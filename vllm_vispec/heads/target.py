"""Does a head fit a target?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.families import find_family
from vllm_vispec.heads.location import is_hub_id
from vllm_vispec.utils.errors import ViSpecError, first_line


def check_against_target(
    head: HeadConfig, hidden_size: int, vocab_size: int, model_type: str = ""
) -> str | None:
    """Refuse a head that was trained for something else than the target.

    Returns:
        A warning if the sizes fit but the head names a `model_type` that is neither the target's
        nor another known family's, else None.

    Raises:
        ViSpecError: hidden size (in a draft VLM: that of the image embeddings it projects),
            vocabulary or family differ.
    """
    trained_for = f" (trained for {head.target_model_type})" if head.target_model_type else ""
    width = "vision_size" if head.is_draft_vlm else "hidden_size"
    for name, theirs in ((width, hidden_size), ("vocab_size", vocab_size)):
        ours = getattr(head, name)
        if ours != theirs:
            raise ViSpecError(
                f"{name} of the head is {ours}{trained_for}, that of the target "
                f"{model_type or 'model'} is {theirs}: use the head that was trained for this "
                "target"
            )
    if not model_type or head.target_model_type in ("", model_type):
        return None
    # A head of a known family cannot read hidden states of another. A name that is not known may be
    # that of the text model inside the target.
    if find_family(head.target_model_type) and find_family(model_type):
        raise ViSpecError(
            f"the head was trained for {head.target_model_type}, the target is {model_type}: use "
            "the head that was trained for this target"
        )
    return (
        f"the head was trained for {head.target_model_type}, the target is {model_type}: "
        "sizes fit, acceptance may be low"
    )


def load_target_config(folder: str | Path, setting: str = "target.model") -> Any:
    """Load the configuration of a target.

    Args:
        setting: what the user calls the target, for messages.

    Raises:
        ViSpecError: it cannot be read, or has no vision part or no language model.
    """
    from transformers import AutoConfig

    if not Path(folder).is_dir() and not is_hub_id(str(folder)):
        raise ViSpecError(
            f"{setting} {str(folder)!r} is neither a folder nor a hub id like 'org/name': give the "
            "folder or hub id of a vision-language model"
        )
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=Path(folder).is_dir()
        )
    except (OSError, ValueError, KeyError) as error:
        raise ViSpecError(
            f"{setting} {str(folder)!r} cannot be read ({first_line(error)}): give the folder "
            "or hub id of a vision-language model that transformers knows"
        ) from error
    if getattr(config, "vision_config", None) is None:
        raise ViSpecError(
            f"{setting} {str(folder)!r} ({config.model_type}) has no vision part: give a "
            "vision-language model, or train a text draft with EAGLE's own tools"
        )
    text = config.get_text_config()
    if not (hasattr(text, "hidden_size") and hasattr(text, "vocab_size")):
        raise ViSpecError(
            f"{setting} {str(folder)!r} ({config.model_type}) has no language model: give a "
            "vision-language model"
        )
    return config


def target_dtype(folder: str | Path) -> str:
    """Return the name of the dtype that a target's config.json states, else "float32".

    Raises:
        ViSpecError: see `load_target_config`.
    """
    config = load_target_config(folder)
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return str(found or "float32").removeprefix("torch.")


def tensor_parallel_sizes(head: HeadConfig) -> list[int]:
    """Return the numbers of tensor-parallel ranks that a head can be spread over, ascending.

    Attention heads are divided among the ranks. Key/value heads are too, or each is given whole to
    as many ranks as there are for it.
    """
    kv_heads = head.num_key_value_heads
    return [
        size
        for size in range(1, head.num_attention_heads + 1)
        if head.num_attention_heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
    ]

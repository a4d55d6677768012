"""What `vispec doctor --target` finds out: whether a head fits a target. Reads no weights."""

from __future__ import annotations

from vllm_vispec.heads import inspect_head
from vllm_vispec.heads.target import (
    check_against_target,
    load_target_config,
    tensor_parallel_sizes,
)


def target_lines(target: str, head: str | None) -> list[str]:
    """What a target is, and that the head fits it.

    Args:
        target: a folder or hub id.
        head: a folder or hub id; None: only the target is looked at.

    Raises:
        ViSpecError: the target or the head cannot be read, or they do not fit; says why.
    """
    config = load_target_config(target, "--target")
    text_config = config.get_text_config()
    facts = {
        "target": target,
        "target type": config.model_type,
        "hidden size": text_config.hidden_size,
        "vocabulary": text_config.vocab_size,
    }
    if head is not None:
        found = inspect_head(head).config
        warning = check_against_target(
            found, text_config.hidden_size, text_config.vocab_size, config.model_type
        )
        sizes = [
            size
            for size in tensor_parallel_sizes(found)
            if text_config.num_attention_heads % size == 0
        ]
        facts["tensor parallel"] = f"up to {sizes[-1]} ({', '.join(map(str, sizes))})"
        facts["fit"] = f"yes, but {warning}" if warning else "yes, head and target go together"
    return [f"{name:14} {value}" for name, value in facts.items()]

"""Does a head fit a target?"""

from __future__ import annotations

from vllm_vispec.errors import ViSpecError
from vllm_vispec.head_config import HeadConfig


def check_against_target(
    head: HeadConfig, hidden_size: int, vocab_size: int, model_type: str = ""
) -> str | None:
    """Refuse a head whose sizes are not the target's.

    Returns:
        A warning if the sizes fit but the head names another `model_type`, else None.

    Raises:
        ViSpecError: hidden size or vocabulary differ.
    """
    trained_for = f" (trained for {head.target_model_type})" if head.target_model_type else ""
    for name, ours, theirs in (
        ("hidden_size", head.hidden_size, hidden_size),
        ("vocab_size", head.vocab_size, vocab_size),
    ):
        if ours != theirs:
            raise ViSpecError(
                f"{name} of the head is {ours}{trained_for}, that of the target "
                f"{model_type or 'model'} is {theirs}: use the head that was trained for this "
                "target"
            )
    if head.target_model_type and model_type and head.target_model_type != model_type:
        return (
            f"the head was trained for {head.target_model_type}, the target is {model_type}: "
            "sizes fit, acceptance may be low"
        )
    return None

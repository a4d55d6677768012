"""The draft that a command is given by name: a head, or a published model."""

from pathlib import Path

from vllm_vispec.heads.folder import HeadInfo, inspect_head, is_vispec_head
from vllm_vispec.heads.location import resolve_head


def is_head(draft: str | Path) -> bool:
    """Whether a folder or hub id is a head, be it complete or not."""
    return is_vispec_head(resolve_head(draft))


def sees_images(info: HeadInfo) -> bool:
    """Whether a published model is a vision-language model, as vLLM says."""
    from vllm_vispec.draft_model import published

    return info.checkpoint_format == published.VLM


def find_published(draft: str, target: str) -> HeadInfo | None:
    """Return the published model that a folder or hub id names, None if it names a head.

    Raises:
        ViSpecError: it does not fit the target, or the target cannot be read.
    """
    if is_head(draft):
        return None
    from vllm_vispec.draft_model import published

    # Only the engine knows how long its prompts are.
    return published.find(draft, {}, published.read_target(target, max_model_len=1))


def check_draft(draft: str, target: str) -> None:
    """Refuse what is neither a head nor a published model that fits the target.

    Raises:
        ViSpecError: says why.
    """
    if find_published(draft, target) is None:
        inspect_head(draft)

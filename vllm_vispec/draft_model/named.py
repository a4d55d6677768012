"""The draft that a command is given by name: a head, or a published model."""

from pathlib import Path

from vllm_vispec.heads.folder import CONFIG, HeadInfo, inspect_head, read_json
from vllm_vispec.heads.location import resolve_head


def is_published(draft: str | Path) -> bool:
    """Whether a config.json is that of a vision-language model, and not of a head.

    Raises:
        ViSpecError: there is none.
    """
    config = read_json(resolve_head(draft) / CONFIG)
    return "vision_config" in config and "vispec" not in config


def find_published(draft: str, target: str) -> HeadInfo | None:
    """Return the published model that a folder or hub id names, None if it names a head.

    Raises:
        ViSpecError: it does not fit the target.
    """
    if not is_published(draft):
        return None
    from vllm.config import ModelConfig

    from vllm_vispec.draft_model import published

    # Only the engine knows how long its prompts are.
    return published.find(draft, {}, ModelConfig(model=target, max_model_len=1))


def check_draft(draft: str, target: str) -> None:
    """Refuse what is neither a head nor a published model that fits the target.

    Raises:
        ViSpecError: says why.
    """
    if find_published(draft, target) is None:
        inspect_head(draft)

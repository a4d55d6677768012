"""What a draft shares with the target, where vLLM does not look for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def findable_parts(target_model: nn.Module) -> Iterator[None]:
    """While a draft is loaded, let vLLM find the parts of targets of every family.

    vLLM's EAGLE takes them from ``get_language_model()``: its ``model`` and ``lm_head``. Idefics 3
    has no class of its own for a language model, so ``get_language_model()`` is the model, and its
    lm_head is the target's. The V1 runner also copies the id of the image token to the draft's
    configuration, where nobody reads it; for most families it calls it ``image_token_index``.
    """
    config: Any = getattr(target_model, "config", None)
    get: Any = getattr(target_model, "get_language_model", None)
    language = target_model if get is None else get()
    added: list[tuple[Any, str]] = []
    # Past nn.Module, which would take a model for a part of itself.
    if not hasattr(language, "model") and hasattr(language, "embed_tokens"):
        language.__dict__["model"] = language
        added.append((language, "model"))
    if not hasattr(language, "lm_head") and hasattr(target_model, "lm_head"):
        language.__dict__["lm_head"] = target_model.lm_head
        added.append((language, "lm_head"))
    if config is not None and not hasattr(config, "image_token_index"):
        config.image_token_index = None
        added.append((config, "image_token_index"))
    try:
        yield
    finally:
        for owner, name in added:
            delattr(owner, name)

"""Patches vLLM in workers that serve a ViSpec head, and chooses what drafts on the V2 runner.

vLLM's runners test the drafter's class by name, so the class is chosen in ``__new__`` rather than
by replacing the name.  Patched when a worker is built: earlier the speculators must not be imported
(they would initialise the device in a parent process), later the runner exists already.
"""

from collections.abc import Callable
from typing import Any

from vllm_vispec.compat.groups import check_features
from vllm_vispec.config import uses_vispec
from vllm_vispec.heads.location import head_folder


def init_worker(
    original: Callable[..., None], worker: Any, vllm_config: Any, *args: Any, **kwargs: Any
) -> None:
    """Patch, before a worker exists, what its engine's features need; nothing without a head."""
    if uses_vispec(vllm_config):
        groups = check_features(vllm_config)
        # A machine without the head says so before it loads the target.
        head_folder(vllm_config.speculative_config.draft_model_config)
        for group in groups:
            group.apply()
    original(worker, vllm_config, *args, **kwargs)

"""The setting ``adaptive``: where K may follow load and acceptance, and what vLLM is told then."""

from __future__ import annotations

from typing import Any

from vllm_vispec.scheduling.control import ladder_schedule
from vllm_vispec.utils.errors import ViSpecError

SCHEDULE = "num_speculative_tokens_per_batch_size"


def resolve_adaptive(
    adaptive: bool | None, settings: dict[str, Any], args: Any, parallel: Any, *, has_tree: bool
) -> bool:
    """Return whether K follows load and acceptance; if so, let vLLM record graphs for every K.

    Args:
        adaptive: What the user says; None: where nothing else decides K.
        settings: The speculative config; gets the schedule.
        args: vLLM's `EngineArgs`.
        parallel: vLLM's `ParallelConfig`.

    Raises:
        ViSpecError: It was asked for, and something else decides K.
    """
    others = {
        SCHEDULE: settings.get(SCHEDULE) is not None,
        "tree": has_tree,
        "enable_adaptive_verification": bool(settings.get("enable_adaptive_verification")),
        "data_parallel_size": parallel.data_parallel_size > 1,
        "scheduler_cls": args.scheduler_cls is not None,
    }
    found = [name for name, is_given in others.items() if is_given]
    if adaptive and found:
        raise ViSpecError(
            f"speculative config: adaptive=true does not go with {found[0]}, by which the number "
            "of draft tokens is decided; leave one of them out"
        )
    if found or adaptive is False:
        return False
    settings[SCHEDULE] = ladder_schedule(settings["num_speculative_tokens"])
    return True

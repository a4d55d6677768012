"""What a benchmark adds to the workers of servers that speculate.

vLLM imports this module in its workers and adds the class to theirs (`--worker-extension-cls`).
The server's development mode calls its method by name (POST ``/collective_rpc``): with both
runners, wherever the engine's process is.

On a CPU the import also repairs vLLM's sampling for whatever speculates there. Our engine does
that for itself; without it vLLM's own methods would accept nothing above temperature zero, and we
would win against a fault. See `vllm_vispec.v1.cpu_repairs`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from vllm.platforms import current_platform

if current_platform.is_cpu() and find_spec("vllm_vispec.v1") is not None:
    from vllm_vispec.v1.patch_points import apply_cpu_repairs

    apply_cpu_repairs()

_DRAFTS = ("drafter", "speculator")
"""Where the V1 and the V2 runner keep what drafts."""


class BenchWorker:
    """Method of every worker of a benchmarked server."""

    model_runner: Any

    def vispec_image_table(self) -> dict[str, int] | None:
        """Return how often images were looked up since the start, and found.

        None if the draft has no image table.
        """
        drafts = (getattr(self.model_runner, name, None) for name in _DRAFTS)
        tables = (getattr(getattr(one, "draft_rows", None), "table", None) for one in drafts)
        table = next((one for one in tables if one is not None), None)
        if table is None:
            return None
        stats = table.stats
        return {"hits": stats.hits, "misses": stats.computed + stats.misses}

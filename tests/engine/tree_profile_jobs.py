"""A child-process job: engines that find out themselves how large their KV cache may be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from tests.engine import lossless_jobs
from tests.support import engine

_CACHE_SIZE = "VLLM_CPU_KVCACHE_SPACE"


def serve(setups: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Serve as :func:`lossless_jobs.serve` does; vLLM runs what it runs at start on GPUs."""
    engine.IN_PROCESS_ENV.pop(_CACHE_SIZE, None)
    os.environ.pop(_CACHE_SIZE, None)
    yield from lossless_jobs.serve(setups)

"""The child process that makes loads: `vllm bench serve`, its imports paid once.

They take longer than most cells of a small model: ten seconds of a core, 45 minutes in a report
of 250 cells that is measured in 30. A load that fails ends the process.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

from vllm_vispec.bench.worker_process import serve_requests


def main() -> None:
    """Answer until stdin ends."""
    serve_requests(run)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Do in this process what `vllm ARGUMENTS` would do."""
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv = ["vllm", *request["arguments"]]
    vllm()
    # The benchmark takes all that is alive out of garbage collection, its own results too.
    gc.unfreeze()
    return {}


if __name__ == "__main__":
    main()

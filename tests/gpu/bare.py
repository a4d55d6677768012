"""What holds on this GPU, found out with torch and Triton: no vLLM, network or weights.

    python -m tests.gpu.bare --output gpu.json [--vllm FOLDER] [--only PART ...]

Each part runs in a process of its own, so that one that crashes the device spoils no other, and
ends with `passed`, `failed`, or `not run` and the reason.  ``--vllm`` names a folder with vLLM's
files (an unpacked wheel will do, nothing is installed): its attention kernels are tried then too.
``--device cpu`` rehearses everything at small sizes, in one process; the tests do so.  Needs under
eight minutes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tests.gpu.setup import NotRun, Setup

SCHEMA = 1
BUDGET_SECONDS = 480.0
REPOSITORY = Path(__file__).resolve().parents[2]


class Part(NamedTuple):
    """One question, answered by ``tests.gpu.<module>:<function>(setup)``.

    Attributes:
        function: Returns what was found, as JSON data; raises if the answer is no.
        seconds: Most time it may take.
    """

    module: str
    function: str
    seconds: float


# The order is that of doubt: what is least sure comes first.
PARTS: dict[str, Part] = {
    "attention_fa3": Part("bare_attention", "run_fa3", 90),
    "attention_fa3_fp8": Part("bare_attention", "run_fa3_fp8", 30),
    "attention_triton": Part("bare_attention", "run_triton", 90),
    "attention_torch": Part("bare_attention", "run_torch", 60),
    "head_size_cost": Part("bare_attention", "run_head_size_cost", 60),
    "tree_step": Part("bare_trees", "run_step", 120),
    "tree_graph": Part("bare_trees", "run_graph", 60),
    "tree_cache": Part("bare_cache", "run_cache", 60),
    "tree_memory": Part("bare_trees", "run_memory", 60),
    "upload_order": Part("bare_draft", "run_upload_order", 45),
    "draft_compile": Part("bare_draft", "run_compile", 120),
}


def main() -> None:
    """Run the chosen parts, or one of them in this process."""
    arguments = _parse()
    if arguments.part:
        result = answer(arguments.part, Setup(arguments.device, arguments.vllm))
        arguments.output.write_text(json.dumps(result), encoding="utf-8")
        return
    results = _run_all(arguments)
    report = {"schema": SCHEMA, "environment": _environment(arguments.device), "parts": results}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    states = [result["state"] for result in results.values()]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("passed", "failed", "not run"))
    print(f"{counts}; written to {arguments.output}")
    sys.exit(1 if "failed" in states else 0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.bare", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--vllm", help="folder with vLLM's files, such as an unpacked wheel's")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.vllm and not Path(arguments.vllm, "v1", "attention").is_dir():
        parser.error(f"--vllm {arguments.vllm} has no v1/attention: name the folder `vllm` itself")
    return arguments


def _run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    deadline = time.monotonic() + BUDGET_SECONDS
    for name in arguments.only or PARTS:
        started = time.monotonic()
        if arguments.device == "cpu":
            result = answer(name, Setup("cpu", arguments.vllm))
        else:
            result = _run_child(name, arguments, min(PARTS[name].seconds, deadline - started))
        seconds = time.monotonic() - started
        results[name] = result | {"seconds": round(seconds, 2)}
        reason = result.get("reason", "")
        print(f"{name:18} {result['state']:8} {seconds:6.1f} s  {reason}", flush=True)
    return results


def _run_child(name: str, arguments: argparse.Namespace, limit: float) -> dict[str, Any]:
    if limit <= 0:
        return {"state": "not run", "reason": "no time was left"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "part.json")
        command = [sys.executable, "-m", "tests.gpu.bare", "--part", name, "--output", str(output)]
        command += ["--vllm", arguments.vllm] if arguments.vllm else []
        try:
            done = subprocess.run(
                command, cwd=REPOSITORY, timeout=limit, capture_output=True, text=True, check=False
            )
            log, ended = done.stderr, f"the process ended with status {done.returncode}"
        except subprocess.TimeoutExpired as error:
            log, ended = str(error.stderr or ""), f"no result after {limit:.0f} s"
        if output.is_file():
            found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
            return found
    return {"state": "failed", "reason": ended, "log": log[-4000:]}


def answer(name: str, setup: Setup) -> dict[str, Any]:
    """Answer one part's question in this process; whatever it raises is its answer."""
    sys.modules["vllm"] = None  # type: ignore[assignment]  # the point is to do without it
    part = PARTS[name]
    try:
        import torch

        if setup.on_gpu and not torch.cuda.is_available():
            raise NotRun("torch finds no CUDA device; rehearse with --device cpu")
        if not setup.on_gpu:
            torch.set_num_threads(1)
        found = getattr(importlib.import_module(f"tests.gpu.{part.module}"), part.function)(setup)
        return {"state": "passed", "found": found}
    except NotRun as reason:
        return {"state": "not run", "reason": str(reason)}
    except Exception as error:
        return {"state": "failed", "reason": f"{type(error).__name__}: {error}"[:2000]}


def _environment(device: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": "cpu",
    }
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
    return found


if __name__ == "__main__":
    main()

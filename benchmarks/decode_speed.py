"""Decode speed of plain vLLM and of ViSpec over K: `python -m benchmarks decode-speed`.

Both engines stay up while they are compared and take turns request by request, at batch 1 and
greedy. Prefill is excluded from decode_speedup and included in e2e_speedup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from benchmarks import FamilyOption, ThreadsOption, calls, turns
from benchmarks.calls import Calls
from benchmarks.report import RESULTS, write_report
from benchmarks.turns import Job
from examples.pair import DraftOption, ModelOption
from examples.tiny_vlm.families import FAMILIES
from examples.tiny_vlm.shipped import HEAD, TARGET
from vllm_vispec.bench.bootstrap import bootstrap

DEFAULT_DRAFT_TOKENS = (2, 3, 4, 5, 6, 7, 8, 10, 12)
SHOWN = [
    "num_speculative_tokens",
    "plain_tokens_per_second",
    "vispec_tokens_per_second",
    "decode_speedup",
    "decode_speedup_interval_95",
    "e2e_speedup",
    "acceptance_length",
    "identical_share",
    "output_tokens",
]


def summarise(num_draft_tokens: int, repetitions: Sequence[Calls]) -> dict[str, Any]:
    """Sum up one K, given its calls by repetition; times in seconds."""
    found = [call for repetition in repetitions for call in repetition]
    interval = bootstrap(repetitions, (1,), lambda drawn: calls.decode_speedup(drawn.ravel()))
    # A question counts as identical if it is in every repetition.
    same = np.all([[all(c.identical or ()) for c in part] for part in repetitions], axis=0)
    mine, plain = calls.tokens_per_second(found)
    return {
        "num_speculative_tokens": num_draft_tokens,
        "identical": int(same.sum()),
        "total": len(same),
        "identical_share": float(same.mean()),
        "decode_speedup": calls.decode_speedup(found),
        "decode_speedup_interval_95": interval.tolist(),
        "decode_speedup_per_repetition": [calls.decode_speedup(part) for part in repetitions],
        "e2e_speedup": calls.e2e_speedup(found),
        "acceptance_length": calls.acceptance_length(found),
        "acceptance_rate_per_position": calls.acceptance_rate_per_position(found, num_draft_tokens),
        "plain_tokens_per_second": plain,
        "vispec_tokens_per_second": mine,
        "plain_ttft": median(call.plain_wall_seconds - call.plain_seconds for call in found),
        "vispec_ttft": median(call.wall_seconds - call.seconds for call in found),
        "output_tokens": mean(sum(call.plain_decoded) + call.batch for call in found),
    }


def sweep(
    job: Job, draft: str, draft_tokens: Sequence[int], repetitions: int, threads: int, logs: Path
) -> list[dict[str, Any]]:
    """Measure every K beside plain vLLM."""
    families = [name for name in job.families or FAMILIES for _ in range(job.per_family)]
    plan = [((number,), (family,)) for number, family in enumerate(families)]
    config = {"method": "vispec", "model": draft}
    drafts = {
        f"K={k}": replace(job, speculative=config | {"num_speculative_tokens": k})
        for k in draft_tokens
    }
    found = turns.side_by_side(
        job, drafts, plan * repetitions, logs / "decode_speed", threads=threads
    )
    results = []
    for k, (name, measured) in zip(draft_tokens, found, strict=True):
        parts = [
            measured.calls[i : i + len(plan)] for i in range(0, len(measured.calls), len(plan))
        ]
        results.append(summarise(k, parts))
        print(f"{name}: decode_speedup {results[-1]['decode_speedup']:.2f}", flush=True)
    return results


def main(
    model: ModelOption = TARGET,
    draft_model: DraftOption = HEAD,
    k: Annotated[list[int] | None, typer.Option(min=1, help="K; repeat. Default 2 to 12.")] = None,
    repetitions: Annotated[int, typer.Option(min=1)] = 3,
    per_family: Annotated[int, typer.Option(min=1, help="Images per task family.")] = 1,
    family: FamilyOption = None,
    max_tokens: Annotated[int, typer.Option(min=2)] = 256,
    dtype: Annotated[str, typer.Option()] = "float32",
    threads: ThreadsOption = 1,
    output: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "decode_speed.json",
    logs: Annotated[Path, typer.Option(help="Folder of the engines' logs.")] = Path("out"),
) -> None:
    """Sweep K and print ViSpec beside plain vLLM."""
    job = Job(model, None, dtype, max_tokens, per_family, tuple(family or ()))
    results = sweep(job, draft_model, k or DEFAULT_DRAFT_TOKENS, repetitions, threads, logs)
    best = max(results, key=lambda one: float(one["decode_speedup"]))
    print(pd.DataFrame(results)[SHOWN].round(2).T.to_string(header=False))
    print(f"best K: {best['num_speculative_tokens']}")
    print(f"acceptance_length: {best['acceptance_length']:.2f}")
    print(f"decode_speedup: {best['decode_speedup']:.2f}")
    settings = {"dtype": dtype, "threads": threads, "max_tokens": max_tokens, "batch": 1}
    settings |= {"repetitions": repetitions, "per_family": per_family, "temperature": 0}
    content = {
        "settings": settings,
        "best_num_speculative_tokens": best["num_speculative_tokens"],
        "results": results,
    }
    write_report(output, content)


if __name__ == "__main__":
    typer.run(main)

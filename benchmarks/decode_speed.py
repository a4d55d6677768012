"""Decode speed of plain vLLM and of ViSpec over K: `python -m benchmarks decode-speed`.

Both engines stay up while they are compared and take turns request by request, at batch 1 and
greedy. Prefill is excluded from decode_speedup and included in e2e_speedup.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import turns
from benchmarks.options import DraftOption, FamilyOption, ModelOption, ThreadsOption
from benchmarks.report import write_report
from benchmarks.turns import Call, Engine, Job
from examples.tiny_vlm.families import FAMILIES
from examples.tiny_vlm.shipped import HEAD, TARGET
from vllm_vispec.bench.bootstrap import bootstrap
from vllm_vispec.bench.machine import describe_machine

DEFAULT_DRAFT_TOKENS = (2, 3, 4, 5, 6, 7, 8, 10, 12)
DEFAULT_OUTPUT = Path("benchmarks/results/decode_speed.json")
TABLE_WIDTH = 130


def summarise(num_draft_tokens: int, repetitions: Sequence[Sequence[Call]]) -> dict[str, Any]:
    """Sum up one K, given its calls by repetition; times in seconds."""
    samples = list(zip(*repetitions, strict=True))
    calls = [call for part in repetitions for call in part]
    interval = bootstrap(
        samples, (0,), lambda drawn: turns.decode_speedup([c for row in drawn for c in row])
    )
    same = [all(all(call.identical or ()) for call in row) for row in samples]
    return {
        "num_speculative_tokens": num_draft_tokens,
        "identical": sum(same),
        "total": len(same),
        "identical_share": sum(same) / len(same),
        "decode_speedup": turns.decode_speedup(calls),
        "decode_speedup_interval_95": interval.tolist(),
        "decode_speedup_per_repetition": [turns.decode_speedup(part) for part in repetitions],
        "e2e_speedup": turns.e2e_speedup(calls),
        "acceptance_length": turns.acceptance_length(calls),
        "acceptance_rate_per_position": turns.acceptance_rate_per_position(calls, num_draft_tokens),
        "plain_tokens_per_second": sum(sum(call.plain_decoded) for call in calls)
        / sum(call.plain_seconds for call in calls),
        "vispec_tokens_per_second": sum(sum(call.decoded) for call in calls)
        / sum(call.seconds for call in calls),
        "plain_ttft": median(call.plain_wall_seconds - call.plain_seconds for call in calls),
        "vispec_ttft": median(call.wall_seconds - call.seconds for call in calls),
        "output_tokens": mean(sum(call.plain_decoded) + call.batch for call in calls),
    }


def sweep(
    job: Job, draft: str, draft_tokens: Sequence[int], repetitions: int, threads: int, logs: Path
) -> list[dict[str, Any]]:
    """Measure every K against the same plain engine."""
    families = job.families or tuple(FAMILIES)
    plan = [
        ((number * job.per_family + place,), (family,))
        for number, family in enumerate(families)
        for place in range(job.per_family)
    ]
    results = []
    with Engine("plain", job, logs / "bench-plain.log", threads) as plain:
        for count in draft_tokens:
            config = {"method": "vispec", "model": draft, "num_speculative_tokens": count}
            ours = replace(job, speculative=config)
            with ExitStack() as stack:
                log = logs / f"bench-vispec-{count}.log"
                vispec = stack.enter_context(Engine(f"K={count}", ours, log, threads))
                found = [row[0] for row in turns.take_turns(plain, [vispec], plan * repetitions)]
            parts = [found[i : i + len(plan)] for i in range(0, len(found), len(plan))]
            results.append(summarise(count, parts))
            print(f"K={count}: decode_speedup {results[-1]['decode_speedup']:.2f}", flush=True)
    return results


def to_table(results: Sequence[dict[str, Any]]) -> Table:
    """Return one row per K."""
    table = Table(title="Plain vLLM and ViSpec, batch 1, greedy")
    columns = ("K", "plain tok/s", "ViSpec tok/s", "decode_speedup", "95 %", "e2e_speedup")
    for name in (*columns, "acceptance_length", "TTFT ms", "identical", "mean output"):
        table.add_column(name, justify="right")
    for one in results:
        table.add_row(
            str(one["num_speculative_tokens"]),
            f"{one['plain_tokens_per_second']:.1f}",
            f"{one['vispec_tokens_per_second']:.1f}",
            f"{one['decode_speedup']:.2f}",
            "-".join(f"{end:.2f}" for end in one["decode_speedup_interval_95"]),
            f"{one['e2e_speedup']:.2f}",
            f"{one['acceptance_length']:.2f}",
            f"{1000 * one['plain_ttft']:.0f} / {1000 * one['vispec_ttft']:.0f}",
            f"{one['identical']}/{one['total']}",
            f"{one['output_tokens']:.0f}",
        )
    return table


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
    output: Annotated[Path, typer.Option(help="JSON file.")] = DEFAULT_OUTPUT,
    logs: Annotated[Path, typer.Option(help="Folder of the engines' logs.")] = Path("out"),
) -> None:
    """Sweep K and print both sides."""
    job = Job(model, None, dtype, max_tokens, per_family, tuple(family or ()))
    machine = describe_machine()
    results = sweep(job, draft_model, k or DEFAULT_DRAFT_TOKENS, repetitions, threads, logs)
    best = max(results, key=lambda one: float(one["decode_speedup"]))
    Console(width=TABLE_WIDTH).print(to_table(results))
    print(f"best K: {best['num_speculative_tokens']}")
    print(f"acceptance_length: {best['acceptance_length']:.2f}")
    print(f"decode_speedup: {best['decode_speedup']:.2f}")
    settings = {"dtype": dtype, "threads": threads, "max_tokens": max_tokens, "batch": 1}
    settings |= {"repetitions": repetitions, "per_family": per_family, "temperature": 0}
    content = {
        "machine": machine,
        "settings": settings,
        "best_num_speculative_tokens": best["num_speculative_tokens"],
        "results": results,
    }
    write_report(output, content)


if __name__ == "__main__":
    typer.run(main)

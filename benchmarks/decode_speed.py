"""Decode speed of plain vLLM and of ViSpec over K: `python -m benchmarks.decode_speed`.

Both engines stay up while they are compared and take turns request by request, at batch 1 and
greedy. Prefill is excluded from decode_speedup and included in e2e_speedup.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.report import write_report
from examples.demo.compare import (
    Exchange,
    Summary,
    run_exchanges,
    summarise,
    tokens_per_second,
    warm_up,
)
from examples.demo.job import Job
from examples.demo.side import Side
from examples.pair import (
    DEFAULT_DRAFT_MODEL,
    DEFAULT_MODEL,
    DraftOption,
    ModelOption,
    Pair,
)
from examples.tiny_vlm.samples import demo_samples
from vllm_vispec.bench.bootstrap import bootstrap
from vllm_vispec.bench.machine import describe_machine

DEFAULT_DRAFT_TOKENS = (2, 3, 4, 5, 6, 7, 8, 10, 12)
TABLE_WIDTH = 130
DEFAULT_OUTPUT = Path("benchmarks/results/decode_speed.json")
WARM_UP_SAMPLES = 2


@dataclass(frozen=True)
class Result:
    """One K.

    Attributes:
        interval: 95 % bootstrap interval of decode_speedup over the requests.
        per_repetition: decode_speedup of each repetition.
    """

    num_draft_tokens: int
    summary: Summary
    interval: tuple[float, float]
    per_repetition: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data, times in seconds."""
        return {
            "num_speculative_tokens": self.num_draft_tokens,
            **asdict(self.summary),
            "identical_share": self.summary.identical / self.summary.total,
            "decode_speedup_interval_95": self.interval,
            "decode_speedup_per_repetition": self.per_repetition,
        }


def decode_speedup(exchanges: Sequence[Exchange]) -> float:
    """Return how many times faster ViSpec decodes the same requests."""
    plain = [answer for exchange in exchanges for answer in exchange.plain]
    vispec = [answer for exchange in exchanges for answer in exchange.vispec]
    return tokens_per_second(vispec) / tokens_per_second(plain)


def judge(num_draft_tokens: int, exchanges: Sequence[Exchange]) -> Result:
    """Sum up the exchanges of one K."""
    repetitions = range(len(exchanges[0].plain))
    single = [
        [Exchange(item.sample, (item.plain[i],), (item.vispec[i],)) for item in exchanges]
        for i in repetitions
    ]
    low, high = bootstrap(exchanges, (0,), lambda drawn: decode_speedup(list(drawn))).tolist()
    return Result(
        num_draft_tokens=num_draft_tokens,
        summary=summarise(exchanges, num_draft_tokens),
        interval=(low, high),
        per_repetition=tuple(decode_speedup(part) for part in single),
    )


def sweep(
    job: Job, draft_tokens: Sequence[int], repetitions: int, threads: int, logs: Path
) -> list[Result]:
    """Measure every K against the same plain engine."""
    samples = range(len(list(demo_samples(job.per_family, job.families or None))))
    results = []
    plain_job = replace(job, draft_model=None)
    with Side("plain", plain_job, logs / "bench-plain.log", threads) as plain:
        warm_up(plain, samples[:WARM_UP_SAMPLES])
        for count in draft_tokens:
            with ExitStack() as stack:
                vispec_job = replace(job, num_speculative_tokens=count)
                log_file = logs / f"bench-vispec-{count}.log"
                vispec = stack.enter_context(Side(f"K={count}", vispec_job, log_file, threads))
                warm_up(vispec, samples[:WARM_UP_SAMPLES])
                result = judge(count, run_exchanges(plain, vispec, samples, repetitions))
            results.append(result)
            print(f"K={count}: decode_speedup {result.summary.decode_speedup:.2f}", flush=True)
    return results


def to_table(results: Sequence[Result]) -> Table:
    """Return one row per K."""
    table = Table(title="Plain vLLM and ViSpec, batch 1, greedy")
    columns = ("K", "plain tok/s", "ViSpec tok/s", "decode_speedup", "95 %", "e2e_speedup")
    for name in (*columns, "tokens_per_round", "TTFT ms", "identical", "mean output"):
        table.add_column(name, justify="right")
    for result in results:
        summary = result.summary
        table.add_row(
            str(result.num_draft_tokens),
            f"{summary.plain_tokens_per_second:.1f}",
            f"{summary.vispec_tokens_per_second:.1f}",
            f"{summary.decode_speedup:.2f}",
            "-".join(f"{end:.2f}" for end in result.interval),
            f"{summary.e2e_speedup:.2f}",
            f"{summary.tokens_per_round:.2f}",
            f"{1000 * summary.plain_ttft:.0f} / {1000 * summary.vispec_ttft:.0f}",
            f"{summary.identical}/{summary.total}",
            f"{summary.output_tokens:.0f}",
        )
    return table


def main(
    model: ModelOption = DEFAULT_MODEL,
    draft_model: DraftOption = DEFAULT_DRAFT_MODEL,
    k: Annotated[list[int] | None, typer.Option(min=1, help="K; repeat. Default 2 to 12.")] = None,
    repetitions: Annotated[int, typer.Option(min=1)] = 3,
    per_family: Annotated[int, typer.Option(min=1, help="Images per task family.")] = 1,
    family: Annotated[list[str] | None, typer.Option(help="Only these task families.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2)] = 256,
    dtype: Annotated[str, typer.Option()] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each engine.")] = 1,
    output: Annotated[Path, typer.Option(help="JSON file.")] = DEFAULT_OUTPUT,
    logs: Annotated[Path, typer.Option(help="Folder of the engines' logs.")] = Path("out"),
) -> None:
    """Sweep K and print both sides."""
    pair = Pair(model, draft_model)
    job = Job.of_pair(
        pair,
        dtype=dtype,
        max_tokens=max_tokens,
        per_family=per_family,
        families=family or (),
    )
    machine = describe_machine()
    results = sweep(job, k or DEFAULT_DRAFT_TOKENS, repetitions, threads, logs)
    best = max(results, key=lambda result: result.summary.decode_speedup)
    Console(width=TABLE_WIDTH).print(to_table(results))
    print(f"best K: {best.num_draft_tokens}")
    print(f"tokens_per_round: {best.summary.tokens_per_round:.2f}")
    print(f"decode_speedup: {best.summary.decode_speedup:.2f}")
    settings = {"dtype": dtype, "threads": threads, "max_tokens": max_tokens, "batch": 1}
    settings |= {"repetitions": repetitions, "per_family": per_family, "temperature": 0}
    content = {
        "machine": machine,
        "settings": settings,
        "best_num_speculative_tokens": best.num_draft_tokens,
        "results": [result.to_json() for result in results],
    }
    write_report(output, content)


if __name__ == "__main__":
    typer.run(main)

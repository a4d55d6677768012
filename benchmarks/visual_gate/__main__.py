"""Does attention to the image tell which rounds a draft loses: `python -m benchmarks.visual_gate`.

ViSkip drafts nothing where the target's last layer looks at the image. Here the target's greedy
answers are replayed with heads, without an engine, and every layer is asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.ablation.data import prepare
from benchmarks.ablation.workspace import Workspace
from benchmarks.report import write_report
from benchmarks.visual_gate.gate import (
    VISKIP_THRESHOLD,
    Counts,
    Gate,
    accepted_in_all,
    cheapest,
    correlation,
    count,
    gate_json,
    gates_at,
    oracle,
)
from benchmarks.visual_gate.watch import ROWS, Sample, look
from examples.pair import (
    DEFAULT_DRAFT_MODEL,
    DEFAULT_DRAFT_TOKENS,
    DEFAULT_MODEL,
    DraftTokensOption,
    ModelOption,
)
from vllm_vispec.bench.machine import describe_machine
from vllm_vispec.errors import ViSpecError

DEFAULT_OUTPUT = Path("benchmarks/results/visual_gate.json")
SPEEDS = Path("benchmarks/results/decode_speed.json")


def main(
    model: ModelOption = DEFAULT_MODEL,
    draft_model: Annotated[
        list[str] | None, typer.Option(help="Repeat. Default: the shipped head.")
    ] = None,
    work_dir: Annotated[Path, typer.Option(help="Held-out answers, made if missing.")] = Path(
        "out/visual_gate"
    ),
    answers: Annotated[Path | None, typer.Option(help="Other held-out answers: JSONL.")] = None,
    held_out: Annotated[int, typer.Option(min=7, help="Conversations.")] = 112,
    layer: Annotated[list[int] | None, typer.Option(help="Repeat. Default: all.")] = None,
    num_speculative_tokens: DraftTokensOption = DEFAULT_DRAFT_TOKENS,
    round_cost: Annotated[
        float | None, typer.Option(help="Of a drafting round, in plain passes. Default: measured.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of the engine that answers.")] = 1,
    output: Annotated[Path, typer.Option(help="JSON file.")] = DEFAULT_OUTPUT,
) -> None:
    """Correlate attention to the image with accepted drafts, and count what gates would cost."""
    cost = round_cost or measured_round_cost(SPEEDS, num_speculative_tokens)
    heads = draft_model or [DEFAULT_DRAFT_MODEL]
    if answers is None:
        workspace = Workspace(work_dir.resolve())
        prepare(workspace, model, 0, held_out, threads, ())
        answers = workspace.held_out
    found = look(model, heads, answers, held_out, num_speculative_tokens)
    settings = {
        "conversations": len(found[heads[0]]),
        "num_speculative_tokens": num_speculative_tokens,
        "round_cost": cost,
        "round_cost_from": "--round-cost" if round_cost else str(SPEEDS),
        "dtype": "float32",
    }
    results = {
        Path(name).name: examine(samples, layer, num_speculative_tokens, cost)
        for name, samples in found.items()
    }
    for name, one in results.items():
        show(name, one)
    content = {"machine": describe_machine(), "settings": settings}
    write_report(output, content | {"heads": results})


def measured_round_cost(file: Path, num_draft_tokens: int) -> float:
    """Cost of a drafting round in plain passes, as the engine had it.

    A round makes tokens_per_round tokens in the time in which plain decoding makes
    tokens_per_round / decode_speedup.

    Raises:
        ViSpecError: it was not measured with so many draft tokens.
    """
    for row in json.loads(file.read_text())["results"]:
        if row["num_speculative_tokens"] == num_draft_tokens:
            return float(row["tokens_per_round"] / row["decode_speedup"])
    raise ViSpecError(
        f"{file} has no result for num_speculative_tokens={num_draft_tokens}: give --round-cost"
    )


def examine(
    samples: Sequence[Sample], layers: Sequence[int] | None, most: int, cost: float
) -> dict[str, Any]:
    """All that is found out about a head.

    Raises:
        ViSpecError: there is no such layer.
    """
    known = sorted(samples[0][0].visual)
    chosen = sorted(layers or known)
    if not set(chosen) <= set(known):
        raise ViSpecError(f"--layer {chosen}: the target has layers 0 to {known[-1]}")
    ungated = _sum([count(sample) for sample in samples])
    tables = {
        (number, row): _per_sample(samples, gates_at(samples, number, row))
        for number in chosen
        for row in ROWS
    }
    viskip = Gate(chosen[-1], "accepted", VISKIP_THRESHOLD)
    of_last = tables[chosen[-1], "accepted"] | _per_sample(samples, [viskip])
    usable = {g: c for (_, row), t in tables.items() if row == "accepted" for g, c in t.items()}
    best = _sum([count(one, lambda turn: oracle(turn, cost)) for one in samples])
    return {
        "rounds": ungated.open,
        "tokens_per_round": 1 + accepted_in_all(samples) / ungated.open,
        "cost_per_token": ungated.cost_per_token(cost),
        "oracle": {
            "rounds_closed": best.closed / (best.open + best.closed),
            "cost_over_no_gate": best.cost_per_token(cost) / ungated.cost_per_token(cost),
        },
        "best_gate_chosen_on_other_half": other_half(samples, usable, cost),
        "layers": [
            correlation(samples, *place, most) | {"best_gate": _costs(table, ungated, cost)[0]}
            for place, table in tables.items()
        ],
        "gates_of_last_layer": _costs(of_last, ungated, cost),
    }


def _costs(
    table: Mapping[Gate, Sequence[Counts]], ungated: Counts, cost: float
) -> list[dict[str, Any]]:
    """Gates as plain data, the cheapest first."""
    found = [gate_json(gate, _sum(counts), ungated, cost) for gate, counts in table.items()]
    return sorted(found, key=lambda one: one["cost_per_token"])


def other_half(
    samples: Sequence[Sample], table: Mapping[Gate, Sequence[Counts]], cost: float
) -> dict[str, float]:
    """Cost over that of no gate, of the gate that was best on the other half of the samples."""
    ungated = [count(sample) for sample in samples]
    halves = (slice(0, None, 2), slice(1, None, 2))
    mine: list[Counts] = []
    for half, other in (halves, halves[::-1]):
        best = cheapest({gate: _sum(counts[half]) for gate, counts in table.items()}, cost)
        mine += table[best][other]
    ratio = _sum(mine).cost_per_token(cost) / _sum(ungated).cost_per_token(cost)
    return {"cost_over_no_gate": ratio}


def _per_sample(samples: Sequence[Sample], gates: Sequence[Gate]) -> dict[Gate, list[Counts]]:
    return {gate: [count(sample, gate.closed) for sample in samples] for gate in gates}


def _sum(counts: Sequence[Counts]) -> Counts:
    return Counts(
        sum(one.open for one in counts),
        sum(one.closed for one in counts),
        sum(one.tokens for one in counts),
    )


def show(name: str, found: Mapping[str, Any]) -> None:
    """Print a head's numbers, one line per layer and row."""
    print(f"{name}: {found['rounds']} rounds, tokens_per_round {found['tokens_per_round']:.2f}")
    for one in found["layers"]:
        low, high = one["spearman_interval_95"]
        print(
            f"  layer {one['layer']:2} {one['row']:8} r {one['mean_r']:.2f} spearman "
            f"{one['spearman']:+.2f} ({low:+.2f} to {high:+.2f}); the best gate costs "
            f"{one['best_gate']['cost_over_no_gate']:.3f} of none"
        )


if __name__ == "__main__":
    typer.run(main)

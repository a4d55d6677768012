"""The demo's numbers as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from examples.demo.compare import Exchange, Summary, summarise


def print_tables(
    console: Console,
    summary: Summary,
    exchanges: Sequence[Exchange],
    families: Mapping[int, str],
    num_draft_tokens: int,
) -> None:
    """Print the comparison, the acceptance per position and one row per task family."""
    console.print(_comparison(summary))
    console.print(_acceptance(summary))
    console.print(_per_family(exchanges, families, num_draft_tokens))


def print_lines(summary: Summary) -> None:
    """Print the lines that scripts read."""
    print(f"identical outputs: {summary.identical}/{summary.total}")
    print(f"acceptance_length: {summary.acceptance_length:.2f}")
    print(f"decode_speedup: {summary.decode_speedup:.2f}")
    print(f"e2e_speedup: {summary.e2e_speedup:.2f}")


def _comparison(summary: Summary) -> Table:
    table = Table(title="Plain vLLM and ViSpec, same run, greedy, batch 1")
    for name in ("", "plain vLLM", "ViSpec", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row(
        "decode, tokens/s",
        f"{summary.plain_tokens_per_second:.1f}",
        f"{summary.vispec_tokens_per_second:.1f}",
        f"[bold]decode_speedup {summary.decode_speedup:.2f}[/bold]",
    )
    table.add_row("whole request", "", "", f"e2e_speedup {summary.e2e_speedup:.2f}")
    table.add_row(
        "TTFT, ms (median)",
        f"{1000 * summary.plain_ttft:.0f}",
        f"{1000 * summary.vispec_ttft:.0f}",
        f"{summary.vispec_ttft / summary.plain_ttft:.2f}",
    )
    table.add_row("tokens per target pass", "1.00", f"{summary.acceptance_length:.2f}", "")
    table.add_row("mean output, tokens", *[f"{summary.output_tokens:.0f}"] * 2, "")
    table.add_row("identical outputs", "", f"{summary.identical}/{summary.total}", "")
    return table


def _acceptance(summary: Summary) -> Table:
    table = Table(title="Acceptance rate per position")
    for position in range(1, len(summary.acceptance_rate_per_position) + 1):
        table.add_column(str(position), justify="right")
    table.add_column("sum", justify="right")
    shares = [f"{100 * share:.0f} %" for share in summary.acceptance_rate_per_position]
    table.add_row(*shares, f"{summary.acceptance_length - 1:.2f}")
    return table


def _per_family(
    exchanges: Sequence[Exchange], families: Mapping[int, str], num_draft_tokens: int
) -> Table:
    table = Table(title="By task")
    names = ("task", "identical", "output tokens", "acceptance_length", "decode_speedup")
    for name in names:
        table.add_column(name, justify="left" if name == "task" else "right")
    for family in dict.fromkeys(families.values()):
        chosen = [item for item in exchanges if families[item.sample] == family]
        part = summarise(chosen, num_draft_tokens)
        table.add_row(
            family,
            f"{part.identical}/{part.total}",
            f"{part.output_tokens:.0f}",
            f"{part.acceptance_length:.2f}",
            f"{part.decode_speedup:.2f}",
        )
    return table

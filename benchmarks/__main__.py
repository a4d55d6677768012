"""`python -m benchmarks`: all measurements with their defaults, or one of them by name."""

from __future__ import annotations

import typer

from benchmarks import decode_speed, draft_cost, train_speed

app = typer.Typer(add_completion=False, help=__doc__)
app.command("decode-speed")(decode_speed.main)
app.command("draft-cost")(draft_cost.main)
app.command("train-speed")(train_speed.main)


@app.callback(invoke_without_command=True)
def run_all(context: typer.Context) -> None:
    """Run everything if no measurement is named."""
    if context.invoked_subcommand is None:
        decode_speed.main()
        draft_cost.main()
        train_speed.main()


if __name__ == "__main__":
    app()

"""`python -m benchmarks`: a measurement of speed or cost by its name."""

from __future__ import annotations

import typer

from benchmarks import adaptive, decode_speed, draft_cost, real, training_step

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)
app.command("adaptive")(adaptive.main)
app.command("decode-speed")(decode_speed.main)
app.command("draft-cost")(draft_cost.main)
app.command("real")(real.main)
app.command("training-step")(training_step.main)

if __name__ == "__main__":
    app()

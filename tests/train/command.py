"""`python -m tests.train.command RECIPE ...`: the command line in a process of its own."""

from __future__ import annotations

import typer

from vllm_vispec.cli.train import train

if __name__ == "__main__":
    typer.run(train)

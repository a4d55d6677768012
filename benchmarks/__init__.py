"""The studies behind `docs/evidence`, and the options that they share.

What they measure by default is the shipped pair.
"""

from __future__ import annotations

from typing import Annotated

import typer

ModelOption = Annotated[str, typer.Option("--model", help="Target: a folder or hub id.")]
DraftOption = Annotated[str, typer.Option("--draft-model", help="ViSpec head: a folder or hub id.")]
DraftTokensOption = Annotated[
    int, typer.Option("--num-speculative-tokens", min=1, help="Draft tokens per step (K).")
]
FamilyOption = Annotated[list[str] | None, typer.Option(help="Only these task families; repeat.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="CPU threads of each process.")]

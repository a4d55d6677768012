"""The studies behind `docs/evidence`, and the options that they share.

What they measure by default is the shipped pair.
"""

from __future__ import annotations

from typing import Annotated

import typer

FamilyOption = Annotated[list[str] | None, typer.Option(help="Only these task families; repeat.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="CPU threads of each process.")]

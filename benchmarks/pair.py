"""The shipped pair that the studies measure, as defaults of their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CHECKPOINTS = Path(__file__).resolve().parents[1] / "examples" / "tiny_vlm" / "checkpoints"
TARGET = str(CHECKPOINTS / "target")
HEAD = str(CHECKPOINTS / "vispec_head")
DRAFT_VLM = str(CHECKPOINTS / "draft_vlm")
DRAFT_TOKENS = 7  # beyond it the intervals of benchmarks/results/decode_speed.json overlap
MAX_MODEL_LEN = 1024

ModelOption = Annotated[str, typer.Option("--model", help="Target: a folder or hub id.")]
DraftOption = Annotated[str, typer.Option("--draft-model", help="ViSpec head: a folder or hub id.")]
DraftTokensOption = Annotated[
    int, typer.Option("--num-speculative-tokens", min=1, help="Draft tokens per step (K).")
]
FamilyOption = Annotated[list[str] | None, typer.Option(help="Only these task families; repeat.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="CPU threads of each process.")]

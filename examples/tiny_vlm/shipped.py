"""Where the trained checkpoints lie, and what they are served with by default."""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
TARGET = str(CHECKPOINTS / "target")
HEAD = str(CHECKPOINTS / "vispec_head")
DRAFT_VLM = str(CHECKPOINTS / "draft_vlm")
SIBLING = str(CHECKPOINTS / "sibling")
DRAFTS = {"head": HEAD, "draft_vlm": DRAFT_VLM, "sibling": SIBLING}
DRAFT_TOKENS = 7  # beyond it the intervals of benchmarks/results/decode_speed.json overlap
MAX_MODEL_LEN = 1024

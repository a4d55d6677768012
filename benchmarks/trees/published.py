"""Published figures to stand beside ours: other targets, machines and questions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A figure of a paper.

    Attributes:
        arxiv: number of the paper.
        speedup: over plain decoding, as the paper takes it.
        tokens_per_round: accepted draft tokens and one; None: not published.
        source: how it is known.
    """

    system: str
    arxiv: str
    setting: str
    speedup: float
    tokens_per_round: float | None
    source: str


# ViSpec counts accepted draft tokens alone; one is added here. Its speedups are ratios of tokens
# per second.
_TREE = "tree of 30, depth 3, top-k 8"
_SUMMARY, _README = "summaries of the paper", "the repository's tables"
PUBLISHED = (
    Published("Spec-LLaVA", "2509.11961", "LLaVA-1.5-7B, T = 0, best", 3.28, None, _SUMMARY),
    Published("Spec-LLaVA", "2509.11961", "LLaVA-1.5-13B, T = 0, best", 2.95, None, _SUMMARY),
    Published("ViSpec", "2509.15235", f"LLaVA-1.6-7B, COCO, T = 0, {_TREE}", 3.22, 4.30, _README),
    Published("ViSpec", "2509.15235", "LLaVA-1.6-7B, mean of 8 sets, T = 0", 2.58, 3.98, _README),
    Published("ViSpec", "2509.15235", "LLaVA-1.6-7B, mean of 8 sets, T = 1", 2.14, 3.09, _README),
    Published("ViSpec", "2509.15235", "Qwen2.5-VL-7B, mean of 8 sets, T = 0", 1.80, 3.24, _README),
    Published("ViSpec", "2509.15235", "Qwen2.5-VL-7B, mean of 8 sets, T = 1", 1.49, 2.66, _README),
)

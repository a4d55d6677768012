"""What SpecVLM reports (arXiv 2509.11815v1): speedup and tokens per round, LLaVA-1.6-7B, greedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

SOURCE = "SpecVLM, arXiv 2509.11815v1"


@dataclass(frozen=True)
class Reported:
    """The paper's tau, a speedup of the whole answer, and its sigma, tokens per round."""

    speedup: float
    tokens_per_round: float

    def __str__(self) -> str:
        return f"{self.speedup:.2f}/{self.tokens_per_round:.2f}"


def _by_amount(*numbers: tuple[int, float, float]) -> Mapping[int, Reported]:
    return MappingProxyType({amount: Reported(*found) for amount, *found in numbers})


# Average over six data sets, MI250, one epoch.
TABLE_3: Mapping[str, Reported] = MappingProxyType(
    {
        "eagle_vlm": Reported(1.88, 3.53),
        "weighted": Reported(2.08, 3.71),
        "concat": Reported(2.03, 3.67),
        "select": Reported(2.03, 3.69),
    }
)
# LLaVA-Bench-in-the-Wild, one branch varied at a time.
TABLE_4: Mapping[str, Mapping[int, Reported]] = MappingProxyType(
    {
        "prune": _by_amount(
            (2, 1.95, 3.35), (3, 1.98, 3.37), (5, 2.00, 3.39), (10, 1.99, 3.38), (20, 2.03, 3.40)
        ),
        "pool": _by_amount(
            (2, 1.97, 3.36), (3, 1.99, 3.39), (5, 2.01, 3.37), (10, 1.98, 3.38), (20, 2.03, 3.40)
        ),
        "conv": _by_amount(
            (2, 1.91, 3.29), (3, 2.03, 3.40), (5, 1.98, 3.35), (10, 1.91, 3.29), (20, 1.88, 2.90)
        ),
        "resampler": _by_amount(
            (1, 1.92, 3.30), (2, 2.03, 3.40), (4, 1.99, 3.36), (8, 2.01, 3.39), (10, 1.98, 3.34)
        ),
    }
)
# LLaVA-Bench-in-the-Wild by epochs of training, MI250.
TABLE_7: Mapping[str, Mapping[int, Reported]] = MappingProxyType(
    {
        "eagle_vlm": _by_amount(
            (1, 1.91, 3.29), (2, 1.99, 4.26), (3, 2.13, 4.42), (4, 2.31, 4.57), (5, 2.43, 4.79)
        ),
        "select": _by_amount(
            (1, 2.03, 3.40), (2, 2.03, 4.32), (3, 2.21, 4.51), (4, 2.33, 4.67), (5, 2.52, 4.84)
        ),
    }
)

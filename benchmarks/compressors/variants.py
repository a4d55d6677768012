"""Heads with every compressor, and the published numbers beside them.

All of them train on the same answers of the target, in the same order, with SpecVLM's loss. A new
variant is one entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from benchmarks.study import EPOCHS, ONLINE, Variant
from vllm_vispec.compressors.spec import PRIMITIVES

SCALING = (1, 2, 3, 4, 5)
RATIOS, QUERIES = (2, 3, 5, 10, 20), (1, 2, 4, 8, 10)
# Table 4 of the paper varies these.
SWEEPS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"prune": RATIOS, "pool": RATIOS, "conv": RATIOS, "resampler": QUERIES}
)
# A run that goes on from epoch to epoch warms up in its first one; so do the others, in as many
# steps.
WARMUP_EPOCHS = 0.05
REFERENCE = "eagle_vlm"


def _variant(
    name: str,
    label: str,
    kind: str,
    compressor: str = "",
    *,
    epochs: tuple[int, ...] = (EPOCHS,),
    more: Mapping[str, str] = MappingProxyType({}),
) -> Variant:
    settings = {
        **ONLINE,
        **more,
        "head.kind": kind,
        "schedule.warmup": str(WARMUP_EPOCHS / epochs[0]),
    }
    if compressor:
        settings["head.compressor"] = compressor
    after = "" if name == REFERENCE else REFERENCE
    return Variant(name, label, "mixed", "target", MappingProxyType(settings), epochs, after)


def _primitive(name: str, amount: int) -> Variant:
    queries = "1 query" if amount == 1 else f"{amount} queries"
    label = f"{name}, {f'{amount}x' if PRIMITIVES[name].amount == 'ratio' else queries}"
    return _variant(f"{name}_{amount}", label, "specvlm", f"{name}:{amount}")


# EAGLE's norm on the draft's input, which SpecVLM adds to its baseline too.
_NORM = MappingProxyType({"head.input_norm": "on"})
# The most telling first: a run that is cut short has the rest missing.
_MAIN = (
    _variant(REFERENCE, "EagleVLM", "eagle_vlm", epochs=SCALING, more=_NORM),
    _variant("select", "select", "specvlm", "select", epochs=SCALING),
    _variant("adaptor_global", "adaptor + global (ViSpec)", "vispec", epochs=SCALING),
    _variant("weighted", "weighted", "specvlm", "weighted"),
    _variant("concat", "concat", "specvlm", "concat"),
    _variant("adaptor", "ViSpec's adaptor", "vispec_no_global"),
    _variant("select_global", "select + global", "specvlm_global", "select"),
    _variant("text_only", "text_only", "specvlm", "text_only"),
)
_DEFAULTS = tuple(_primitive(name, PRIMITIVES[name].default) for name in SWEEPS)
_SWEEP = tuple(
    _primitive(name, amount)
    for name, amounts in SWEEPS.items()
    for amount in amounts
    if amount != PRIMITIVES[name].default
)
_NO_NORM = _variant("eagle_vlm_no_norm", "EagleVLM without its input norm", "eagle_vlm")

VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {variant.name: variant for variant in (*_MAIN, *_DEFAULTS, *_SWEEP, _NO_NORM)}
)

# What SpecVLM reports (arXiv 2509.11815v1), LLaVA-1.6-7B, greedy: speedup of the whole answer (its
# tau) and acceptance length (its sigma).
SOURCE = "SpecVLM, arXiv 2509.11815v1"
Reported = tuple[float, float]
# Average over six data sets, MI250, one epoch.
TABLE_3: Mapping[str, Reported] = MappingProxyType(
    {
        "eagle_vlm": (1.88, 3.53),
        "weighted": (2.08, 3.71),
        "concat": (2.03, 3.67),
        "select": (2.03, 3.69),
    }
)


def _by_amount(amounts: tuple[int, ...], *numbers: Reported) -> Mapping[int, Reported]:
    return MappingProxyType(dict(zip(amounts, numbers, strict=True)))


# LLaVA-Bench-in-the-Wild, one branch varied at a time.
TABLE_4: Mapping[str, Mapping[int, Reported]] = MappingProxyType(
    {
        "prune": _by_amount(
            RATIOS, (1.95, 3.35), (1.98, 3.37), (2.00, 3.39), (1.99, 3.38), (2.03, 3.40)
        ),
        "pool": _by_amount(
            RATIOS, (1.97, 3.36), (1.99, 3.39), (2.01, 3.37), (1.98, 3.38), (2.03, 3.40)
        ),
        "conv": _by_amount(
            RATIOS, (1.91, 3.29), (2.03, 3.40), (1.98, 3.35), (1.91, 3.29), (1.88, 2.90)
        ),
        "resampler": _by_amount(
            QUERIES, (1.92, 3.30), (2.03, 3.40), (1.99, 3.36), (2.01, 3.39), (1.98, 3.34)
        ),
    }
)
# LLaVA-Bench-in-the-Wild by epochs of training, MI250.
TABLE_7: Mapping[str, Mapping[int, Reported]] = MappingProxyType(
    {
        "eagle_vlm": _by_amount(
            SCALING, (1.91, 3.29), (1.99, 4.26), (2.13, 4.42), (2.31, 4.57), (2.43, 4.79)
        ),
        "select": _by_amount(
            SCALING, (2.03, 3.40), (2.03, 4.32), (2.21, 4.51), (2.33, 4.67), (2.52, 4.84)
        ),
    }
)

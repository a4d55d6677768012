"""What compressors of images buy and cost a draft, on the tiny pair of `examples/tiny_vlm`.

Here are the variants: heads with every compressor. All of them train on the same answers of the
target, in the same order, with SpecVLM's loss. A new variant is one entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from benchmarks.study import EPOCHS, ONLINE, Variant, by_name
from vllm_vispec.compressors.spec import PRIMITIVES

SCALING = (1, 2, 3, 4, 5)
"""Epochs after which some variants are measured."""
RATIOS = (2, 3, 5, 10, 20)
# Table 4 of the paper varies these.
SWEEPS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"prune": RATIOS, "pool": RATIOS, "conv": RATIOS, "resampler": (1, 2, 4, 8, 10)}
)
# A run that goes on from epoch to epoch warms up in its first one; so do the others, in as many
# steps.
WARMUP_EPOCHS = 0.05
REFERENCE = "eagle_vlm"


def _variant(
    name: str, label: str, kind: str, epochs: tuple[int, ...] = (EPOCHS,), **head: str
) -> Variant:
    more = {**ONLINE, "schedule.warmup": str(WARMUP_EPOCHS / epochs[0])}
    more |= {f"head.{setting}": value for setting, value in head.items()}
    after = "" if name == REFERENCE else REFERENCE
    return Variant(name, label, kind, MappingProxyType(more), epochs=epochs, after=after)


def _primitive(name: str, amount: int) -> Variant:
    queries = "1 query" if amount == 1 else f"{amount} queries"
    label = f"{name}, {f'{amount}x' if PRIMITIVES[name].amount == 'ratio' else queries}"
    return _variant(f"{name}_{amount}", label, "specvlm", compressor=f"{name}:{amount}")


# The most telling first: a run that is cut short has the rest missing.
VARIANTS = by_name(
    # With EAGLE's norm on the draft's input, which SpecVLM adds to its baseline too.
    _variant(REFERENCE, "EagleVLM", "eagle_vlm", SCALING, input_norm="on"),
    _variant("select", "select", "specvlm", SCALING, compressor="select"),
    _variant("adaptor_global", "adaptor + global (ViSpec)", "vispec", SCALING),
    _variant("weighted", "weighted", "specvlm", compressor="weighted"),
    _variant("concat", "concat", "specvlm", compressor="concat"),
    _variant("adaptor", "ViSpec's adaptor", "vispec_no_global"),
    _variant("select_global", "select + global", "specvlm_global", compressor="select"),
    _variant("text_only", "text_only", "specvlm", compressor="text_only"),
    *(_primitive(name, PRIMITIVES[name].default) for name in SWEEPS),
    *(
        _primitive(name, amount)
        for name, amounts in SWEEPS.items()
        for amount in amounts
        if amount != PRIMITIVES[name].default
    ),
    _variant("eagle_vlm_no_norm", "EagleVLM without its input norm", "eagle_vlm"),
)

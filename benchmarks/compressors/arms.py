"""Registry of the arms: one kind of head or compressor each; a new one is one entry.

All of them train on the same answers of the target, in the same order, with SpecVLM's loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from benchmarks.ablation.arms import EPOCHS, ONLINE, Arm
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


def _arm(
    name: str,
    label: str,
    kind: str,
    compressor: str = "",
    *,
    epochs: tuple[int, ...] = (EPOCHS,),
    more: Mapping[str, str] = MappingProxyType({}),
) -> Arm:
    settings = {
        **ONLINE,
        **more,
        "head.kind": kind,
        "schedule.warmup": str(WARMUP_EPOCHS / epochs[0]),
    }
    if compressor:
        settings["head.compressor"] = compressor
    after = "" if name == REFERENCE else REFERENCE
    return Arm(name, label, "mixed", "target", MappingProxyType(settings), epochs, after)


def _primitive(name: str, amount: int) -> Arm:
    queries = "1 query" if amount == 1 else f"{amount} queries"
    label = f"{name}, {f'{amount}x' if PRIMITIVES[name].amount == 'ratio' else queries}"
    return _arm(f"{name}_{amount}", label, "specvlm", f"{name}:{amount}")


# EAGLE's norm on the draft's input, which SpecVLM adds to its baseline too.
_NORM = MappingProxyType({"head.input_norm": "on"})
# The most telling first: a run that is cut short has the rest missing.
_MAIN = (
    _arm(REFERENCE, "EagleVLM", "eagle_vlm", epochs=SCALING, more=_NORM),
    _arm("select", "select", "specvlm", "select", epochs=SCALING),
    _arm("adaptor_global", "adaptor + global (ViSpec)", "vispec", epochs=SCALING),
    _arm("weighted", "weighted", "specvlm", "weighted"),
    _arm("concat", "concat", "specvlm", "concat"),
    _arm("adaptor", "ViSpec's adaptor", "vispec_no_global"),
    _arm("select_global", "select + global", "specvlm_global", "select"),
    _arm("text_only", "text_only", "specvlm", "text_only"),
)
_DEFAULTS = tuple(_primitive(name, PRIMITIVES[name].default) for name in SWEEPS)
_SWEEP = tuple(
    _primitive(name, amount)
    for name, amounts in SWEEPS.items()
    for amount in amounts
    if amount != PRIMITIVES[name].default
)
_NO_NORM = _arm("eagle_vlm_no_norm", "EagleVLM without its input norm", "eagle_vlm")

ARMS: Mapping[str, Arm] = MappingProxyType(
    {arm.name: arm for arm in (*_MAIN, *_DEFAULTS, *_SWEEP, _NO_NORM)}
)

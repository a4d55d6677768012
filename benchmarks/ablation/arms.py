"""Registry of the arms. Each adds one thing to the arm before it; a new one is one entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

# All arms but `online` train for as long as this, on as many samples.
EPOCHS = 2

# Rollout as in the shipped head's recipe; every pass weighs a little less than the one before.
ROLLOUT = MappingProxyType({"loss.passes": "5", "loss.pass_decay": "0.9"})
# SpecVLM (arXiv 2509.11815): its loss on the target's logits, and a constant rate, so that one run
# goes through all epochs. The target's states come from the cache: the same numbers as with the
# target in every step (tests/train/test_loop.py), in a fifth of the time.
ONLINE = MappingProxyType(
    {"loss.name": "specvlm", "loss.weights": "{}", "schedule.decay": "constant"}
)


@dataclass(frozen=True)
class Arm:
    """One way to make a head.

    Attributes:
        name: of its folders and in the JSON.
        label: in tables and plots.
        data: which questions, "mixed" (all task families) or "text" (no images).
        answers: "short" (the question set's own) or "target" (written by the target, sampled).
        settings: changes to the base recipe.
        epochs: a head is measured after each of these.
        after: the arm that it changes in one thing; "" for a start of its own.
    """

    name: str
    label: str
    data: str
    answers: str
    settings: Mapping[str, str]
    epochs: tuple[int, ...] = (EPOCHS,)
    after: str = ""


@dataclass(frozen=True)
class Cell:
    """One head: an arm after some epochs, with one seed."""

    arm: Arm = field(hash=False)
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.arm.name}-e{self.epochs}-s{self.seed}"


def _of_kind(kind: str, more: Mapping[str, str] = MappingProxyType({})) -> Mapping[str, str]:
    return MappingProxyType({"head.kind": kind, **more})


_EAGLE_TEXT = Arm("eagle_text", "EAGLE, text only", "text", "target", _of_kind("eagle_text"))
_EAGLE_VLM = Arm("eagle_vlm", "EagleVLM", "mixed", "short", _of_kind("eagle_vlm"))
_ADAPTOR = replace(
    _EAGLE_VLM,
    name="adaptor",
    label="+ adaptor",
    settings=_of_kind("vispec_no_global"),
    after="eagle_vlm",
)
_GLOBAL = replace(
    _ADAPTOR,
    name="global",
    label="+ global feature",
    settings=_of_kind("vispec"),
    after="adaptor",
)
_REGENERATED = replace(
    _GLOBAL, name="regenerated", label="+ answers of the target", answers="target", after="global"
)
_ROLLOUT = replace(
    _REGENERATED,
    name="rollout",
    label="+ rollout passes",
    settings=_of_kind("vispec", ROLLOUT),
    after="regenerated",
)
# The same three kinds of heads on the target's own answers: what the adaptor and the global feature
# buy once the data are right.
_EAGLE_VLM_OWN = replace(
    _EAGLE_VLM,
    name="eagle_vlm_regenerated",
    label="EagleVLM, answers of the target",
    answers="target",
    after="eagle_vlm",
)
_ADAPTOR_OWN = replace(
    _ADAPTOR,
    name="adaptor_regenerated",
    label="+ adaptor, answers of the target",
    answers="target",
    after="eagle_vlm_regenerated",
)
_ONLINE = replace(
    _REGENERATED,
    name="online",
    label="online distillation",
    settings=_of_kind("vispec", ONLINE),
    epochs=(1, 2, 3, 4, 5),
    after="regenerated",
)
# EAGLE's loss is SpecVLM's: the text baseline as its authors train it.
_EAGLE_TEXT_OWN_LOSS = replace(
    _EAGLE_TEXT,
    name="eagle_text_own_loss",
    label="EAGLE, text only, its own loss",
    settings=_of_kind("eagle_text", ONLINE),
    after="eagle_text",
)
# ViSpec and the EAGLE that differs from it only in what it is and in what it reads.
MATCHED = (("regenerated", "eagle_text"), ("online", "eagle_text_own_loss"))

ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        arm.name: arm
        for arm in (
            _EAGLE_TEXT,
            _EAGLE_TEXT_OWN_LOSS,
            _EAGLE_VLM,
            _ADAPTOR,
            _GLOBAL,
            _REGENERATED,
            _ROLLOUT,
            _EAGLE_VLM_OWN,
            _ADAPTOR_OWN,
            _ONLINE,
        )
    }
)

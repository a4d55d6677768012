"""The families of targets that are known: what was tested, which drafts exist, what to use.

The table is `families.yaml`; `docs/targets.md` is written from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from vllm_vispec.utils.settings import Settings

TESTED_ON = "2026-12-01"
_TABLE = Path(__file__).with_name("families.yaml")
_PREFIX_LM = frozenset({"gemma3", "paligemma", "molmo2", "bagel", "moondream3"})
_MTP_LAYERS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
_OWN_MTP = "MTP: layers of the checkpoint itself"


class Family(Settings):
    """One family.

    Attributes:
        types: The ``model_type`` of its config.json; several for models of one class.
        sizes: Published ones.
        image_tokens, positions: How images lie in a prompt, and what attention is told of it.
        tested: The runners on which a tiny model of it passed `tests/engine/test_families.py` or
            the tests of all families; "": none.
        refused: Why it is refused; "": it is not.
        is_trainable: `vispec train` takes it.
        scales_embeddings: The target multiplies embeddings by the root of its hidden size.
        heads: Published ViSpec heads by the target's hidden size.
        drafts: Published drafts that vLLM serves without us.
        sibling: The smallest published model and its hidden size.
    """

    name: str
    types: tuple[str, ...]
    sizes: str
    image_tokens: str
    positions: str
    tested: str = ""
    refused: str = ""
    note: str = ""
    is_trainable: bool = True
    scales_embeddings: bool = False
    heads: Mapping[int, str] = {}
    drafts: tuple[str, ...] = ()
    sibling: Mapping[str, int] = {}

    @property
    def state(self) -> str:
        """Return what was tested, or why it is refused, as one text."""
        found = f"tested {TESTED_ON} on {self.tested}" if self.tested else "untested"
        found = f"refused: {self.refused}" if self.refused else found
        untrainable = "" if self.is_trainable else "vispec train does not take it"
        return "; ".join(filter(None, (found, self.note, untrainable)))

    def published_drafts(self) -> str:
        """Return all drafts that exist for it, as one text."""
        heads = [f"ViSpec: {', '.join(self.heads.values())}"] if self.heads else []
        siblings = [f"sibling: {name}" for name in self.sibling]
        return "; ".join([*heads, *self.drafts, *siblings]) or "none found"


@lru_cache
def families() -> tuple[Family, ...]:
    """Return all families, in the order of the table."""
    found = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    return TypeAdapter(tuple[Family, ...]).validate_python(found)


@lru_cache
def find_family(model_type: str) -> Family | None:
    """Return the family of a ``model_type``, None if it is unknown."""
    return next((family for family in families() if model_type in family.types), None)


def was_tested(model_type: str) -> bool:
    """Whether the tests serve a tiny model of this ``model_type``'s family."""
    family = find_family(model_type)
    return family is not None and bool(family.tested)


def attends_both_ways(config: Any) -> bool:
    """Whether a target's tokens of an image see each other, later ones too (prefix-LM).

    Args:
        config: Its transformers configuration.
    """
    both = getattr(config.get_text_config(), "use_bidirectional_attention", None)
    return config.model_type in _PREFIX_LM or both == "vision"


def embedding_scale(model_type: str, hidden_size: int) -> float:
    """Return what a target multiplies the rows of its embedding table by."""
    family = find_family(model_type)
    return hidden_size**0.5 if family is not None and family.scales_embeddings else 1.0


def recommend(config: Any) -> str:
    """Say how to speculate for a target, best first.

    Args:
        config: The target's transformers configuration.
    """
    text = config.get_text_config()
    family = find_family(config.model_type)
    # vLLM serves them for some families only.
    is_mtp_known = family is None or _OWN_MTP in family.drafts
    if is_mtp_known and any(getattr(text, name, None) for name in _MTP_LAYERS):
        served = "served by vLLM" if family else "if vLLM serves this family's"
        return (
            f"its own MTP layers, {served}: --speculative-config "
            '\'{"method": "mtp", "num_speculative_tokens": 3}\''
        )
    if family is None:
        return "nobody tested this family: train a ViSpec head and watch its acceptance, or n-gram"
    head = family.heads.get(text.hidden_size)
    if head is not None and not family.refused:
        # Other models have this size, too.
        return f"the ViSpec head {head}, if the target is the model that it is named for"
    if family.drafts:
        return (
            f"a draft that vLLM serves by itself, if it is of this size: {'; '.join(family.drafts)}"
        )
    for name, size in family.sibling.items():
        if text.hidden_size >= 2 * size:
            return f"the sibling {name} as the draft (docs/draft-model.md), or train a ViSpec head"
    if family.refused or not family.is_trainable:
        return "n-gram where answers repeat the prompt (documents, tables), else nothing"
    return (
        "train a ViSpec head (docs/training.md); until then n-gram where answers repeat the "
        "prompt (documents, tables), else nothing"
    )

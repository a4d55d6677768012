"""Drafts of every kind for the tiny targets, and requests with and without images for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support.tiny_families import VOCAB
from tests.support.tiny_store import GATED, KIND, UNCOMPRESSED, TinyStore
from tests.support.workloads import Request, image_text, words

SIZES: Mapping[str, Any] = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64}


@dataclass(frozen=True)
class Draft:
    """A draft, and what an engine with it is told.

    Attributes:
        head: Changes to :meth:`TinyStore.head`, or to :meth:`TinyStore.draft_vlm`.
        options: Of the engine.
        few_tokens: Whether it drafts from two thirds of the vocabulary.
    """

    head: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    is_vlm: bool = False
    is_sibling: bool = False
    is_text_model: bool = False
    few_tokens: bool = False

    def of(self, tiny: TinyStore, kind: str = KIND) -> dict[str, Any]:
        """Return the options of an engine with this draft for the target of family ``kind``."""
        make: Callable[..., str] = tiny.draft_vlm if self.is_vlm else tiny.head
        if self.is_sibling:
            make = tiny.sibling
        if self.is_text_model:
            make = tiny.text_model
        found = {"draft": make(kind, **self.head), **self.options}
        if self.few_tokens:
            file = tiny.root / "two_thirds.json"
            file.write_text(json.dumps([token for token in range(VOCAB) if token % 3]))
            found["config"] = {**found.get("config", {}), "draft_vocab": str(file)}
        return found


def tree(nodes: int = 7, config: Mapping[str, Any] | None = None, **how: Any) -> dict[str, Any]:
    """Return the options of an engine with trees; small ones unless told otherwise."""
    setting = {"policy": "eagle2", "depth": 3, "top_k": 2, **how}
    return {"num_draft_tokens": nodes, "tree": setting, "config": dict(config or {})}


SCHEDULE = {"num_speculative_tokens_per_batch_size": [[1, 1, 4], [2, 2, 1], [3, 4, 2]]}
DRAFTS: Mapping[str, Draft] = {
    "chain": Draft(),
    "tree": Draft(options=tree()),
    "path": Draft(options=tree(4, policy="spec_llava", top_k=1, threshold=0.9)),
    "draft_vlm": Draft(is_vlm=True),
    "gated": Draft(GATED),
    "no_compress": Draft(UNCOMPRESSED),
    "draft_vocab": Draft(few_tokens=True),
    "schedule": Draft(options={"config": SCHEDULE}),
}


def start_options(tiny: TinyStore, name: str) -> dict[str, Any]:
    """Return the options of a small engine with one of :data:`DRAFTS`."""
    return {**SIZES, "num_draft_tokens": 4, **DRAFTS[name].of(tiny)}


def start_requests(max_tokens: int = 8) -> list[Request]:
    """Return prompts with no image, one and two; they end at different times."""
    image = image_text(KIND, 1)
    return [
        Request("two", f"{image} and {image} {words(1, 9)}", (2, 4), max_tokens),
        Request("one", f"{words(2, 6)} {image} {words(3, 5)}", (3,), max_tokens + 3),
        Request("text", words(4, 12), (), max_tokens - 2),
    ]

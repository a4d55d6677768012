"""Drafts of every kind, started as GPUs start them, and how an engine has started."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.support.spies import drafter, model_runner, watch_drafts
from tests.support.tiny_configs import VOCAB
from tests.support.tiny_store import GATED, KIND, UNCOMPRESSED, TinyStore
from tests.support.workloads import Request, Served, image_text, serve_requests, words

if TYPE_CHECKING:
    from vllm import LLM

SIZES: Mapping[str, Any] = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64}
EAGLE2 = {"policy": "eagle2", "depth": 3, "top_k": 2}
PATH = {"policy": "spec_llava", "depth": 3, "top_k": 1, "threshold": 0.9}
SCHEDULE = [[1, 1, 4], [2, 2, 1], [3, 4, 2]]
# Changes to the head, and speculative settings.
KINDS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "chain": ({}, {}),
    "tree": ({}, {"tree": EAGLE2, "num_speculative_tokens": 7}),
    "path": ({}, {"tree": PATH}),
    "draft_vlm": ({}, {}),
    "gated": (GATED, {}),
    "no_compression": (UNCOMPRESSED, {}),
    "draft_vocab": ({}, {"draft_vocab": [token for token in range(VOCAB) if token % 3]}),
    "schedule": ({}, {"num_speculative_tokens_per_batch_size": SCHEDULE}),
}


def draft_options(tiny: TinyStore, kind: str) -> dict[str, Any]:
    """Return the options of an engine with a draft of ``kind``."""
    changes, settings = KINDS[kind]
    config = {"num_speculative_tokens": 4, **settings}
    if "draft_vocab" in config:
        file = tiny.root / "start-vocab.json"
        file.write_text(json.dumps({"token_ids": config["draft_vocab"]}))
        config["draft_vocab"] = str(file)
    draft = tiny.draft_vlm() if kind == "draft_vlm" else tiny.head(**changes)
    return {**SIZES, "draft": draft, "config": config}


def start_requests(max_tokens: int = 8) -> list[Request]:
    """Return prompts with no image, one and two; they end at different times."""
    image = image_text(KIND, 1)
    return [
        Request("two", f"{image} and {image} {words(1, 9)}", (2, 4), max_tokens),
        Request("one", f"{words(2, 6)} {image} {words(3, 5)}", (3,), max_tokens + 3),
        Request("text", words(4, 12), (), max_tokens - 2),
    ]


@dataclass(frozen=True)
class Start:
    """What an engine answered and drafted, and how it was started.

    Attributes:
        compiled: Names of the classes of modules that were; ``loaded`` those among them that vLLM
            took from its cache.
        kv_cache_given: Whether the size of the KV cache was given, not found by a profile.
    """

    served: Served
    drafts: list[list[list[int]]]
    compiled: list[str]
    loaded: list[str]
    dtype: str
    kv_cache_given: bool


def serve_and_look(llm: LLM) -> Start:
    """Serve :func:`start_requests` (in the engine's process)."""
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper as Compiled

    with watch_drafts(llm) as drafts:
        served = serve_requests(llm, start_requests())
    config, models = llm.llm_engine.vllm_config, [model_runner(llm).get_model(), drafter(llm).model]
    modules = [one for model in models for one in model.modules() if isinstance(one, Compiled)]
    used = [
        one
        for one in modules
        if not one.do_not_compile and (one.compiled or getattr(one, "aot_compiled_fn", None))
    ]
    loaded = [one for one in used if one.was_aot_compile_fn_loaded_from_disk]
    return Start(
        served,
        drafts,
        sorted(type(one).__name__ for one in used),
        sorted(type(one).__name__ for one in loaded),
        str(config.model_config.dtype),
        config.cache_config.kv_cache_memory_bytes is not None,
    )


def assert_same_start(eager: Start, found: Start) -> None:
    """Same tokens, same drafts, and as many of them accepted in every step."""
    assert found.served.outputs() == eager.served.outputs()
    assert found.drafts == eager.drafts
    assert found.served.accepted() == eager.served.accepted()
    assert found.served.acceptance() > 0

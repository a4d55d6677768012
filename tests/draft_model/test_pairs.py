"""Siblings of every shape draft, token by token, what transformers says they say.

Acceptance is a weak witness where a model drafts badly, so the drafts themselves are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.support.engine import Completion, Engine
from tests.support.quantised import quantise
from tests.support.runners import marks
from tests.support.spies import watch, watch_drafts
from tests.support.tiny_families import FAMILIES, byte_bpe_tokenizer
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import Request, drive, forget, image_text, words

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

# Prompts and most images are split.
SMALL: Mapping[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 24}
MROPE_64 = {"mrope_section": [12, 10, 10], "mrope_interleaved": True, "rope_theta": 5e6}
# Text and tower of a sibling: depth, width, heads, tables longer and shorter than the target's.
WIDE = {"num_hidden_layers": 1, "hidden_size": 160, "num_attention_heads": 5, "vocab_size": 1100}
DEEP = {"num_hidden_layers": 5, "num_key_value_heads": 3, "vocab_size": 700}
TIED = {"tie_word_embeddings": True}
SHAPES: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "qwen2_5_vl-wide": (
        "qwen2_5_vl",
        WIDE,
        {"depth": 3, "fullatt_block_indexes": [0, 2], "hidden_size": 64, "window_size": 112},
    ),
    "qwen2_5_vl-deep": ("qwen2_5_vl", DEEP | TIED, {"depth": 1, "fullatt_block_indexes": []}),
    "qwen3_vl-wide": ("qwen3_vl", WIDE, {"depth": 4, "deepstack_visual_indexes": [2]}),
    "qwen3_vl-deep": (
        "qwen3_vl",
        DEEP | TIED | {"head_dim": 64, "rope_parameters": {"rope_type": "default", **MROPE_64}},
        {"depth": 4, "hidden_size": 64, "deepstack_visual_indexes": [0, 1, 3]},
    ),
    "llava-deep": ("llava", DEEP | TIED, {"num_hidden_layers": 2}),
    "llava_next-wide": ("llava_next", WIDE | {"head_dim": 64}, {"hidden_size": 64}),
}
ROWS = [
    pytest.param(runner, name, id=f"{runner}-{name}", marks=marks(runner, slow))
    for runner, names, slow in (
        ("v1", SHAPES, False),
        ("v2", ("qwen2_5_vl-wide", "qwen3_vl-deep", "llava_next-wide"), True),
        ("v1-overlay", ("qwen3_vl-wide", "llava-deep"), False),
        ("v2-overlay", ("qwen3_vl-wide",), False),
    )
    for name in names
]
Drafted = list[tuple[list[int], list[int]]]
"""What was answered before each draft, and the draft."""


@pytest.mark.parametrize(("runner", "name"), ROWS)
def test_a_sibling_drafts_what_it_says(
    engine: Callable[..., Engine], tiny: TinyStore, runner: str, name: str
) -> None:
    kind, text, vision = SHAPES[name]
    sibling = tiny.sibling(kind, vision=dict(vision), **text)
    drafting = engine(runner, kind=kind, draft=sibling, num_draft_tokens=3, **SMALL)
    requests = _requests(kind)[: 2 if runner.startswith("v2") else None]
    found, num_hits = drafting.run(draft, requests, turns=2)
    for request, drafted in zip(requests, found, strict=True):
        assert_says(sibling, request, drafted)
    # vLLM 0.33 ends some of them before the image.
    assert num_hits or runner.endswith("overlay")


def _requests(kind: str) -> list[Request]:
    image, before = image_text(kind, 1), 1
    tokenizer = byte_bpe_tokenizer(FAMILIES[kind])
    while len(tokenizer.encode(words(2, before)).ids) < 22:
        before += 1
    return [
        # An image of 16 tokens across the border of the first two cached blocks.
        Request("cut", f"{words(2, before)} {image} {words(3, 34)}", (7,), 6),
        Request("three", f"{image} and {image} or {image} {words(1, 3)}", (2, 3, 4), 8),
        Request("text", words(4, 30), (), 9),
    ]


def test_shards_and_bfloat16(engine: Callable[..., Engine], tiny: TinyStore) -> None:
    """As most models are published and served."""
    from transformers import AutoModelForImageTextToText

    folder = tiny.root / "sharded"
    whole = tiny.sibling()
    if not folder.exists():
        model = AutoModelForImageTextToText.from_pretrained(whole, dtype=torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="200KB")
        for file in Path(whole).iterdir():
            if file.name not in {"config.json", "model.safetensors"}:
                (folder / file.name).write_bytes(file.read_bytes())
    assert len(list(folder.glob("*.safetensors"))) > 1
    drafting = engine("v1", draft=str(folder), num_draft_tokens=3, dtype="bfloat16", **SMALL)
    requests = _requests(KIND)
    for request, drafted in zip(requests, drafting.run(draft, requests)[0], strict=True):
        assert_says(str(folder), request, drafted, tolerance=0.05)


def test_a_quantised_draft(engine: Callable[..., Engine], tiny: TinyStore) -> None:
    """Its list of layers that are not quantised names them as published, without a prefix."""
    folder, whole = tiny.root / "quantised", tiny.sibling()
    if not folder.exists():
        quantise(Path(whole), folder)
    options = {"dtype": "bfloat16", **SMALL}
    drafting = engine("v1", draft=str(folder), num_draft_tokens=3, **options)
    requests = _requests(KIND)
    for request, drafted in zip(requests, drafting.run(draft, requests)[0], strict=True):
        assert_says(whole, request, drafted, tolerance=0.1)


def test_engines_for_text_and_with_adapters(engine: Callable[..., Engine], tiny: TinyStore) -> None:
    """Without its tower, and beside a target whose layers an adapter may change."""
    limits = {"image": 0, "video": 0}
    options = {"limit_mm_per_prompt": limits, "enable_lora": True, "max_lora_rank": 8, **SMALL}
    sibling = tiny.sibling()
    drafting = engine("v1", draft=sibling, num_draft_tokens=3, **options)
    requests = _requests(KIND)[-1:]
    for request, drafted in zip(requests, drafting.run(draft, requests)[0], strict=True):
        assert_says(sibling, request, drafted)


@lru_cache
def _model(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


@torch.inference_mode()
def assert_says(
    folder: str,
    request: Request,
    drafted: Drafted,
    tolerance: float = 1e-4,
    positions: Callable[..., torch.Tensor] | None = None,
    **videos: Any,
) -> None:
    """Each drafted token is the one with the model's largest logit, as transformers computes it.

    Args:
        tolerance: By how much another may be larger, relative to the largest.
        positions: Gives rotary positions from the model and its inputs.
        videos: What its processor takes beside text and images.
    """
    model, processor = _model(folder)
    prompt = request.prompt()
    images = prompt.get("multi_modal_data", {}).get("image")
    asked = dict(processor(text=prompt["prompt"], images=images, return_tensors="pt", **videos))
    assert drafted
    for answered, tokens in drafted:
        ids = torch.tensor([answered + tokens])
        rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in asked:
            rows["mm_token_type_ids"] = torch.zeros_like(ids)
        whole = {key: torch.cat([asked[key], row], dim=1) for key, row in rows.items()}
        inputs = asked | whole
        if positions is not None:
            inputs["position_ids"] = positions(model, inputs)
        logits_TV = model(**inputs, use_cache=False).logits[0, -len(tokens) - 1 : -1]
        assert bool((logits_TV.amax(dim=-1) > logits_TV.amin(dim=-1)).all()), "it says anything"
        chosen_T = logits_TV[torch.arange(len(tokens)), torch.tensor(tokens)]
        gap_T = logits_TV.amax(dim=-1) - chosen_T
        assert bool((gap_T <= tolerance * logits_TV.abs().max()).all()), (request.name, answered)


# What follows runs in the child.


def draft(llm: LLM, requests: Sequence[Request], turns: int = 1) -> tuple[list[Drafted], int]:
    """Serve each request alone, with cold caches first; return its drafts.

    The second number counts hits of the prefix cache that end inside an image.
    """
    found, num_hits = [], 0
    for request in requests:
        forget(llm)
        drafted = Drafted()
        for _ in range(turns):
            with watch_drafts(llm) as drafts, watch(llm) as spy:
                (one,) = drive(llm, [request])[request.name]
            drafted += _with_answers(one, drafts)
            num_hits += spy.hits_inside_image
        found.append(drafted)
    return found, num_hits


def _with_answers(one: Completion, drafts: Sequence[list[list[int]]]) -> Drafted:
    """Leave out the drafts behind chunks of the prompt, and those behind the answer's end."""
    steps, done, found = one.per_step_accepted, 1, Drafted()
    for (draft,), accepted in zip(drafts[-len(steps) - 1 : -1], steps, strict=True):
        found.append((one.token_ids[:done], draft))
        done += accepted + 1
    return found

"""A draft's own vision tower: it runs once for an image, and the memory profile sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

from tests.support.engine import Engine
from tests.support.runners import runners
from tests.support.spies import (
    SchedulerSpy,
    drafter,
    engine_core,
    model_runner,
    watch,
    watch_encoder,
)
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import Request, drive, forget, image_text, prefix, words

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

IMAGE = image_text(KIND, 1)
# 9 usable blocks of 32 tokens: requests preempt each other.
BLOCKS = {"max_num_seqs": 8, "max_num_batched_tokens": 48, "num_blocks": 10}


@pytest.mark.parametrize("runner", runners("v1", "v2", slow=["v2"]))
def test_it_runs_once_for_an_image(
    engine: Callable[..., Engine], tiny: TinyStore, runner: str
) -> None:
    options = {"draft": tiny.sibling(), "num_draft_tokens": 3}
    runs, spy = engine(runner, **options, **BLOCKS).run(_share_an_image)
    assert runs == [(1, 1)]
    assert spy.split_images
    assert spy.preempted
    few = engine(runner, **options, max_num_seqs=8, max_num_batched_tokens=48)
    runs, spy = few.run(_hit_inside_an_image)
    assert sum(draft for _, draft in runs) == 2
    assert spy.hits_inside_image
    # As the target's does: features that were dropped are made again.
    runs, most = few.run(_evict)
    assert runs == [(1, 1)] * (most + 2)


@pytest.mark.parametrize("runner", runners("v1", "v2", slow=["v2"]))
def test_the_memory_profile_sees_it(
    engine: Callable[..., Engine], tiny: TinyStore, runner: str
) -> None:
    options = {"compiler": "eager", "memory_profile": True, "max_num_seqs": 8}
    drafting = engine(runner, process="tower", draft=tiny.sibling(), num_draft_tokens=3, **options)
    drafting.child.call(_note_runs)
    runs, token_bytes = drafting.run(_profiled)
    assert runs
    assert all(target == draft > 0 for target, draft in runs)
    # Keys and values: 3 layers of 2 heads and 2 layers of one, in float32.
    assert token_bytes == 2 * (3 * 2 + 2 * 1) * 32 * 4


# What follows runs in the child.

Runs = list[tuple[int, int]]
"""Images of the target's tower and of the draft's, run by run."""


@contextmanager
def _watch_towers(llm: LLM) -> Iterator[Runs]:
    own, runs, counts = drafter(llm).model.model, Runs(), list[int]()
    embed = own.embed_multimodal

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = embed(*args, **kwargs)
        counts.append(len(found))
        return found

    forget(llm)
    with watch_encoder(llm) as theirs, patch.object(own, "embed_multimodal", counted):
        yield runs
    runs += zip(theirs, counts, strict=True)


def _share_an_image(llm: LLM) -> tuple[Runs, SchedulerSpy]:
    requests = [
        Request(f"shared-{i}", f"{words(i, 8 + 5 * i)} {IMAGE} {words(9, 6)}", (7,), 30)
        for i in range(6)
    ]
    with _watch_towers(llm) as runs, watch(llm) as spy:
        drive(llm, requests)
    return runs, spy


def _hit_inside_an_image(llm: LLM) -> tuple[Runs, SchedulerSpy]:
    with _watch_towers(llm) as runs, watch(llm) as spy:
        prefix(llm, KIND)
    return runs, spy


def _evict(llm: LLM) -> tuple[Runs, int]:
    """Serve one more image of 16 tokens than are kept, then the first again; return the most."""
    most = engine_core(llm).scheduler.encoder_cache_manager.cache_size // 16
    images = [2 + 5 * index for index in range(most + 1)]
    with _watch_towers(llm) as runs:
        for turn, image in enumerate([*images, images[0]]):
            drive(llm, [Request(f"evict-{turn}", f"{words(turn, 3)} {IMAGE}", (image,), 2)])
    return runs, most


_noted: Runs = []


def _note_runs() -> None:
    from vllm_vispec.draft_model.model import EagleDraftModelForCausalLM

    both = EagleDraftModelForCausalLM._embed_both

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = both(self, *args, **kwargs)
        _noted.append((len(found), sum(hasattr(one, "vispec_draft_features") for one in found)))
        return found

    patch.object(EagleDraftModelForCausalLM, "_embed_both", noted).start()


def _profiled(llm: LLM) -> tuple[Runs, float]:
    """Return what ran while the engine started, and the bytes of a token in its KV cache."""
    config = model_runner(llm).kv_cache_config
    # All lie in one allocation, whose size each of them states.
    (size,) = {one.size for one in config.kv_cache_tensors}
    block_size = config.kv_cache_groups[0].kv_cache_spec.block_size
    return _noted, size / config.num_blocks / block_size

"""What a benchmark adds to a server's workers."""

from __future__ import annotations

from importlib import import_module, reload
from types import ModuleType, SimpleNamespace

import pytest
import torch

from vllm_vispec.bench.server import EXTENSION, IMAGE_TABLE
from vllm_vispec.spec_decode.image_table import TableStats


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """vLLM's rejection sampler; what a test does to it is undone."""
    from vllm.v1.sample import rejection_sampler

    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", lambda *_: None)
    return rejection_sampler


def draft(stats: TableStats) -> SimpleNamespace:
    return SimpleNamespace(draft_rows=SimpleNamespace(table=SimpleNamespace(stats=stats)))


@pytest.mark.parametrize("place", ["drafter", "speculator"])
def test_lookups_of_both_runners(sampler: ModuleType, place: str) -> None:
    module, _, name = EXTENSION.rpartition(".")
    worker = getattr(import_module(module), name)()
    found = draft(TableStats(hits=7, computed=2, misses=1, evicted=1))
    worker.model_runner = SimpleNamespace(**{place: found})
    assert getattr(worker, IMAGE_TABLE)() == {"hits": 7, "misses": 3}


@pytest.mark.parametrize(
    "runner",
    [
        SimpleNamespace(),
        SimpleNamespace(drafter=None),
        SimpleNamespace(drafter=SimpleNamespace()),
        SimpleNamespace(speculator=None),
    ],
)
def test_other_drafts_have_no_table(sampler: ModuleType, runner: SimpleNamespace) -> None:
    module, _, name = EXTENSION.rpartition(".")
    worker = getattr(import_module(module), name)()
    worker.model_runner = runner
    assert getattr(worker, IMAGE_TABLE)() is None


@pytest.mark.parametrize("is_cpu", [True, False])
def test_sampling_is_repaired_on_a_cpu(
    sampler: ModuleType, is_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own EAGLE and n-gram get what our engine gives itself; a GPU needs nothing."""
    from vllm.platforms import current_platform

    module = import_module(EXTENSION.rpartition(".")[0])
    # The import in this process, if it was the first, has repaired the sampler already.
    monkeypatch.setattr(sampler, "expand_batch_to_tokens", faulty := lambda *_: None)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: is_cpu)
    reload(module)
    if not is_cpu:
        assert sampler.expand_batch_to_tokens is faulty
        return
    counts = torch.tensor([2, 3])
    repeated = sampler.expand_batch_to_tokens(torch.tensor([0.5, 0.7]), counts, 3)
    assert repeated.tolist() == pytest.approx([0.5, 0.5, 0.7])

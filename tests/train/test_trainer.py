"""One optimizer step: what a token weighs, what a wrapper must do, memory that runs out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.models.llava.modeling_llava import LlavaModel

from tests.support.tiny_store import TinyStore
from tests.train.runs import recipe, run
from vllm_vispec.reference.layers import DecoderLayer
from vllm_vispec.train import acceptance, rollout, trainer
from vllm_vispec.train.distributed import Processes, accumulating, shared, whole
from vllm_vispec.train.losses import Objective
from vllm_vispec.train.trainer import Trainer
from vllm_vispec.utils.errors import ViSpecError


def test_a_token_weighs_the_same_in_every_step(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of steps add up to that of a step over all their samples, of any lengths."""
    found: list[torch.Tensor] = []

    def keep(self: Trainer, norm: float, number: int, lr: float) -> None:
        found.append(torch.cat([g.flatten() for g in self._gradients()]))

    def first_step(self: Trainer, passes: Any, number: int, *rest: Any) -> Any:
        samples = [one for batch in passes for one in batch]
        for chosen in (samples[:1], samples[1:], samples):
            result = step(self, [chosen], number, *rest)
        return result

    step = Trainer.step
    monkeypatch.setattr(Trainer, "_update", keep)
    monkeypatch.setattr(Trainer, "step", first_step)
    config = recipe(tiny.target("llava"), dialogues, tmp_path / "run", schedule__max_steps=1)
    run(config)
    short, long, both = found
    assert float((both - short).norm()) > 0.1 * float(both.norm())
    torch.testing.assert_close(short + long, both, rtol=1e-3, atol=1e-5)


def test_a_wrapper_that_trains_nothing_is_refused(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "shared", lambda module, *_: copy.deepcopy(module))
    with pytest.raises(ViSpecError, match="weights of the draft got no gradient"):
        run(recipe(tiny.target("llava"), dialogues, tmp_path / "run"))


def test_gradients_are_exchanged_in_the_last_pass_alone() -> None:
    exchanged: list[int] = []

    def exchange(_: Any, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        exchanged.append(number)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        two = Processes(0, 2, torch.device("cpu"))
        replica = shared(torch.nn.Linear(4, 4), two, shard=False)
        exchange.__annotations__.clear()  # DDP reads them, and these are text
        replica.register_comm_hook(None, exchange)
        for number in range(3):
            with accumulating(replica, more_passes=number < 2):
                replica(torch.ones(2, 4)).sum().backward()
    finally:
        dist.destroy_process_group()
    assert exchanged == [2]


def test_a_sharded_draft_reduces_in_the_last_pass_alone() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = torch.nn.Linear(4, 4)
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        reduced = []
        for number in range(3):
            with accumulating(module, more_passes=number < 2):
                module(torch.ones(2, 4)).sum().backward()
            reduced.append(module.weight.grad is not None)
        assert reduced == [False, False, True]
        assert float(whole(module.weight.grad).mean()) == 3 * 2
    finally:
        dist.destroy_process_group()


def no_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("owner", "name", "message"),
    [
        (LlavaModel, "forward", r"in the target, with .*fill a cache first \(teacher"),
        (DecoderLayer, "forward", r"in rollout pass 0, with .*loss\.chunk_rows or loss\.passes"),
        (rollout, "_attend", r"in rollout pass 1, with .*loss\.chunk_rows or loss\.passes"),
        (Objective, "_rows", r"in the logits of rollout pass 0, with .*loss\.chunk_rows"),
        (acceptance, "simulate", r"in validation, with .*run\.num_draft_tokens"),
        (torch.Tensor, "backward", r"in the backward pass, with .*batch\.size"),
    ],
)
def test_memory_that_runs_out_is_named(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    owner: Any, name: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(owner, name, no_memory)
    with pytest.raises(ViSpecError, match=message) as caught:
        run(recipe(tiny.target("llava"), dialogues, tmp_path / "run"))
    # The samples in work, with their lengths.
    assert "sample-" in str(caught.value)
    assert " tokens)" in str(caught.value)
    assert "\n" not in str(caught.value)

"""The draft's inputs: uploads that arrive in order, and the layer input under torch.compile.

Shapes: T tokens of a batch, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo.testing
from torch import nn

from tests.gpu.bare_trees import record
from tests.gpu.setup import Setup
from vllm_vispec.spec_decode.adaptor import TextFusion
from vllm_vispec.spec_decode.row_table import RowTable
from vllm_vispec.spec_decode.step import DraftStep, RowIds

NUM_UPLOADS = 200


def run_upload_order(setup: Setup) -> Any:
    """Row ids that are uploaded while the device lags behind arrive whole and in order."""
    num_tokens = 4096 if setup.on_gpu else 64
    table = RowTable(RowIds(256, 2), 8, num_tokens).to(setup.device)
    table.offset.copy_(torch.arange(table.ids.size, device=setup.device)[:, None].expand(-1, 8))
    found = torch.empty(NUM_UPLOADS, num_tokens, dtype=table.offset.dtype, device=setup.device)
    generator = torch.Generator().manual_seed(0)
    expected = torch.randint(256, (NUM_UPLOADS, num_tokens), dtype=torch.int32, generator=generator)
    if setup.on_gpu:
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
    for index, row_ids_T in enumerate(expected):
        host_T = row_ids_T.clone()
        table.set_step(DraftStep(host_T.pin_memory() if setup.on_gpu else host_T))
        del host_T  # the allocator may use its memory again
        found[index] = table.batch_offset[:, 0]
    wrong = int((found.cpu().int() != expected).any(dim=1).sum())
    assert wrong == 0, f"{wrong} of {NUM_UPLOADS} uploads arrived late or torn"
    return {"uploads": NUM_UPLOADS, "tokens": num_tokens}


class _LayerInput(nn.Module):
    """What ViSpec computes in front of the draft's layer, and the keys' mask behind it."""

    def __init__(self, hidden_size: int, max_num_tokens: int) -> None:
        super().__init__()
        self.fusion = TextFusion(hidden_size)
        self.rows = RowTable(RowIds(9, 2), hidden_size, max_num_tokens)
        channels = torch.zeros(1, hidden_size)
        channels[:, -8:] = 1.0
        self.register_buffer("key_channels", channels)

    def forward(self, embeddings: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        input_TD = self.rows.layer_input(self.fusion.fuse(embeddings, hidden))
        mask_T1 = self.rows.key_mask_of(input_TD.shape[0])
        return torch.addcmul(input_TD, mask_T1, self.key_channels)


def run_compile(setup: Setup) -> Any:
    """One compiled function serves every batch size, also as a graph."""
    hidden_size, max_num_tokens = (3584, 8192) if setup.on_gpu else (64, 512)
    dtype = torch.bfloat16 if setup.on_gpu else torch.float32
    generator = torch.Generator().manual_seed(0)
    with torch.device(setup.device):
        module = _LayerInput(hidden_size, max_num_tokens).to(dtype)
    for tensor in (module.fusion.weight.data, module.rows.offset):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * hidden_size**-0.5)
    row_ids_T = torch.randint(19, (max_num_tokens,), dtype=torch.int32, generator=generator)
    module.rows.set_step(DraftStep(row_ids_T))
    counter = torch._dynamo.testing.CompileCounterWithBackend(
        "inductor" if setup.on_gpu else "eager"
    )
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend=counter)
    errors: dict[str, float] = {}
    with torch.no_grad():
        # vLLM compiles at the longest batch, where slices of the buffers are whole.
        for num_tokens in (max_num_tokens, 1, 5, 17, max_num_tokens - 1, 256):
            inputs = [
                torch.randn(num_tokens, hidden_size, generator=generator).to(setup.device, dtype)
                for _ in range(2)
            ]
            for tensor in inputs:
                torch._dynamo.mark_dynamic(tensor, 0) if num_tokens > 1 else None
            error = float((compiled(*inputs) - module(*inputs)).abs().max())
            errors[f"{num_tokens} tokens"] = round(error, 6)
        errors["256 tokens, as a graph"] = _graph_error(compiled, inputs, setup)
    assert max(errors.values()) <= (0.05 if setup.on_gpu else 1e-5), errors
    # One for every size; one more where torch makes a batch of one token a case of its own.
    assert counter.frame_count <= 2, f"compiled {counter.frame_count} times"
    return errors | {"compiled": counter.frame_count}


def _graph_error(compiled: Any, inputs: list[torch.Tensor], setup: Setup) -> float:
    """Record the compiled function, replay it on other data, and compare with a call."""
    static = [tensor.clone() for tensor in inputs]
    replay, output = record(lambda: compiled(*static), setup)
    for tensor in static:
        tensor.mul_(0.5)
    replay()
    return float((output() - compiled(*static)).abs().max())

"""Drafting with a published model on the V2 model runner.

A published model reads every token of a sequence from the first, each at its own position. So the
first pass has the target's rows as they are, where a head's are one token ahead. It only fills the
draft's cache. The token that the target sampled last opens the first of K one-token steps.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)

from vllm_vispec.draft_model.rows import PublishedRows
from vllm_vispec.spec_decode.speculator import ViSpecSpeculator
from vllm_vispec.trees.cudagraph import manager_for
from vllm_vispec.trees.paths import PathSpeculator
from vllm_vispec.trees.speculator import TreeSpeculator

# Where `_generate_draft` takes the number of steps; vLLM gives it by name or by place.
_NUM_STEPS_PLACE = 6


class PublishedSpeculator(ViSpecSpeculator):
    """vLLM's EAGLE speculator with one step more, whose first pass samples nothing."""

    draft_rows: PublishedRows  # type: ignore[assignment]
    decode_cudagraph_manager: SpeculatorCudaGraphManager | None

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        # Column 0 holds the token that the target sampled.
        self.num_speculative_steps += 1
        shape = self.max_num_reqs, self.num_speculative_steps
        self.draft_tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._next_tokens = torch.zeros_like(self.draft_tokens[:, 0])
        self._is_first_pass = False
        # The target's rotary positions, where it has any and attention is set up.
        self._rotary_AT: torch.Tensor | None = None
        # None while graphs are recorded.
        self._batch: InputBatch | None = None

    def load_model(self, target_model: nn.Module) -> None:
        """Load the draft, and let its vision tower run with the target's."""
        super().load_model(target_model)
        self.model.follow_tower(target_model)

    def make_draft_rows(self) -> PublishedRows:
        """Return what lays the batch out."""
        rows: PublishedRows = self.model.make_rows()
        return rows

    def set_attn(self, model_state: Any, *args: Any, **kwargs: Any) -> None:
        """Learn where the target's M-RoPE positions are kept, if it has any."""
        super().set_attn(model_state, *args, **kwargs)
        inputs = model_state.prepare_dummy_inputs(self.max_num_reqs, self.max_num_tokens)
        self._rotary_AT = inputs.get("positions") if self.model.sees_images else None

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Record first passes as long as the target's, and one step more than drafts."""
        self.num_speculative_steps -= 1
        super().init_cudagraph_manager(cudagraph_mode)
        self.num_speculative_steps += 1
        drafts = self.decode_cudagraph_manager
        assert drafts is not None
        schedule = self.speculative_config.num_speculative_tokens_per_batch_size
        if schedule is not None:
            schedule = [(first, last, count + 1 if count else 0) for first, last, count in schedule]
        steps = manager_for(drafts, schedule, drafts.cudagraph_mode, drafts.decode_query_len)
        # Of the manager's own copy.
        steps.vllm_config.speculative_config.num_speculative_tokens += 1
        self.decode_cudagraph_manager = steps

    def propose(
        self,
        input_batch: InputBatch,
        *args: Any,
        num_speculative_tokens: int | None = None,
        mm_inputs: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return drafts ``[R, K]``; vLLM's `mm_inputs` are the target's and one token ahead."""
        count = num_speculative_tokens
        if count is None:
            count = self.num_speculative_steps - 1
        if self._rotary_AT is not None:
            num_rows = input_batch.num_tokens
            rotary_AT = self._rotary_AT[:, :num_rows]
            self.model.positions.set_step(rotary_AT, input_batch.positions[:num_rows])
        self._batch = input_batch
        drafts = super().propose(
            input_batch, *args, num_speculative_tokens=count + 1 if count else 0, **kwargs
        )
        self._batch = None
        return drafts[:, 1:]

    def _prefill(
        self, *args: Any, mm_inputs: Any = None, skip_sample: bool = False, **kwargs: Any
    ) -> None:
        """Run the first pass with the draft's own image features, and to its end.

        vLLM 0.33 stops before it where no step follows. But trees grow from what it leaves there:
        the positions of the requests' last rows.
        """
        super()._prefill(*args, mm_inputs=self.draft_rows.features, **kwargs)

    def on_prefill_begin(self, num_reqs: int) -> None:
        """Undo the shift by one token that heads need; outside any graph."""
        super().on_prefill_begin(num_reqs)
        self._is_first_pass = True
        if self._batch is not None:
            ids, count = self.input_buffers.input_ids, self._batch.num_tokens
            self._next_tokens[:num_reqs] = ids[self.last_token_indices[:num_reqs]]
            ids[:count] = self._batch.input_ids[:count]

    def on_prefill_end(self, num_reqs: int) -> None:
        """Turn to the next token of each request."""
        super().on_prefill_end(num_reqs)
        self._is_first_pass = False

    def sample_draft(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the target's token in the first pass, else the draft's, one column on."""
        if self._is_first_pass:
            return self._next_tokens[: hidden_states.shape[0]]
        position_R, idx_mapping, temperature, seeds, step, *others = args
        args = (position_R - 1, idx_mapping, temperature, seeds, step - 1, *others)
        return super().sample_draft(hidden_states, *args, **kwargs)

    def _generate_draft(self, *args: Any, **kwargs: Any) -> None:
        """Prepare the next step behind all but the very last, whatever this batch's number."""
        kwargs["num_speculative_steps"] = self.num_speculative_steps
        super()._generate_draft(*args[:_NUM_STEPS_PLACE], **kwargs)


class PublishedPathSpeculator(PathSpeculator, PublishedSpeculator):  # type: ignore[misc]
    """Drafts one step more, and ends where the draft is unsure."""


class PublishedTreeSpeculator(TreeSpeculator, PublishedSpeculator):  # type: ignore[misc]
    """Grows trees from the tokens that the target sampled last, which open a pass of their own."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.root_tokens = self._next_tokens

    def sample_draft(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the target's token in the first pass, a chain's behind it."""
        return PublishedSpeculator.sample_draft(self, hidden_states, *args, **kwargs)

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

from vllm_vispec.compat.patching import patch
from vllm_vispec.draft_model.rows import PublishedRows
from vllm_vispec.spec_decode.speculator import ViSpecSpeculator


class PublishedSpeculator(ViSpecSpeculator):
    """vLLM's EAGLE speculator with one step more, whose first pass samples nothing."""

    draft_rows: PublishedRows  # type: ignore[assignment]

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        # Column 0 holds the token that the target sampled.
        self.num_speculative_steps += 1
        shape = self.max_num_reqs, self.num_speculative_steps
        self.draft_tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._next_tokens = torch.zeros_like(self.draft_tokens[:, 0])
        self._is_first_pass = self._is_capturing = False
        self._batch: Any = None

    def load_model(self, target_model: nn.Module) -> None:
        """Load the draft, and let its vision tower run with the target's."""
        super().load_model(target_model)
        self.model.follow_tower(target_model)

    def make_draft_rows(self) -> PublishedRows:
        """Return what lays the batch out."""
        return PublishedRows(self.model)

    def set_attn(self, model_state: Any, *args: Any, **kwargs: Any) -> None:
        """Learn prompts as they come: M-RoPE positions are read off a whole prompt."""
        super().set_attn(model_state, *args, **kwargs)
        patch(model_state, "add_request", self._add_request)
        patch(model_state, "remove_request", self._remove_request)

    def _add_request(self, original: Any, req_index: int, new_req_data: Any) -> Any:
        found = new_req_data
        if found.mm_features:
            self.draft_rows.note(found.req_id, found.mm_features, found.prefill_token_ids)
        return original(req_index, new_req_data)

    def _remove_request(self, original: Any, req_id: str) -> Any:
        self.draft_rows.forget(req_id)
        return original(req_id)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Record passes as long as the target's: the first pass has no row more."""
        self.num_speculative_steps -= 1
        try:
            super().init_cudagraph_manager(cudagraph_mode)
        finally:
            self.num_speculative_steps += 1

    def capture(self) -> None:
        """Record the first pass, and one step more than vLLM counts."""
        self._is_capturing = True
        try:
            super().capture()
        finally:
            self._is_capturing = False

    def propose(
        self,
        input_batch: Any,
        *args: Any,
        num_speculative_tokens: int | None = None,
        mm_inputs: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return drafts ``[R, K]``; vLLM's `mm_inputs` are the target's and one token ahead."""
        self._batch = input_batch
        count = num_speculative_tokens
        if count is None:
            count = self.num_speculative_steps - 1
        drafts = super().propose(
            input_batch,
            *args,
            num_speculative_tokens=count + 1 if count else 0,
            **kwargs,
        )
        return drafts[:, 1:]

    def _prefill(self, *args: Any, mm_inputs: Any = None, **kwargs: Any) -> None:
        """Run the first pass with the draft's own image features."""
        super()._prefill(*args, mm_inputs=self.draft_rows.features, **kwargs)

    def on_prefill_begin(self, num_reqs: int) -> None:
        """Undo the shift by one token that heads need; outside any graph."""
        super().on_prefill_begin(num_reqs)
        self._is_first_pass = True
        if not self._is_capturing:
            ids, batch = self.input_buffers.input_ids, self._batch
            self._next_tokens[:num_reqs] = ids[self.last_token_indices[:num_reqs]]
            count = batch.num_tokens
            ids[:count] = batch.input_ids[:count]

    def on_prefill_end(self, num_reqs: int) -> None:
        """Turn to the next token of each request."""
        super().on_prefill_end(num_reqs)
        self._is_first_pass = False

    def sample_draft(
        self,
        hidden_states: torch.Tensor,
        sample_src_positions: torch.Tensor,
        idx_mapping: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        draft_step: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the target's token in the first pass, else the draft's, one column on."""
        if self._is_first_pass:
            return self._next_tokens[: hidden_states.shape[0]]
        return super().sample_draft(
            hidden_states,
            sample_src_positions - 1,
            idx_mapping,
            temperature,
            seeds,
            draft_step - 1,
            *args,
            **kwargs,
        )

    def _generate_fused_drafts(self, *args: Any, **kwargs: Any) -> None:
        """Record one step more than vLLM counts; it gives the number by name when it records."""
        if self._is_capturing:
            kwargs["num_speculative_steps"] += 1
        super()._generate_fused_drafts(*args, **kwargs)

    def _generate_draft(
        self,
        num_reqs: int,
        num_tokens_padded: int,
        attn_metadata: Any,
        slot_mappings: Any,
        num_tokens_across_dp: Any,
        cudagraph_runtime_mode: CUDAGraphMode,
        num_speculative_steps: int,
    ) -> None:
        """Prepare the next step behind all but the very last, whatever this batch's number."""
        super()._generate_draft(
            num_reqs,
            num_tokens_padded,
            attn_metadata,
            slot_mappings,
            num_tokens_across_dp,
            cudagraph_runtime_mode,
            self.num_speculative_steps,
        )

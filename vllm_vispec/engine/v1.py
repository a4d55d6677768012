"""ViSpec on the V1 model runner, which is also the CPU's."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.spec_decode.eagle import EagleProposer

from vllm_vispec.engine.draft_rows import DraftRows, RequestRows
from vllm_vispec.engine.draft_vocab import give_own_lm_head
from vllm_vispec.engine.first_pass import FirstPassPlan
from vllm_vispec.engine.resets import clear_with
from vllm_vispec.engine.worker_hook import reads_embeddings, reads_target_states


class ViSpecProposer(EagleProposer):
    """vLLM's EAGLE proposer plus row codes and plain 1-D positions."""

    draft_rows: DraftRows
    hidden_states: torch.Tensor

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        if not reads_target_states(vllm_config):
            self.hidden_states = self.hidden_states.new_empty(self.max_num_tokens, 0)
        self._runner = runner
        self._first_draft_rows: torch.Tensor | None = None
        self._kept_tokens: torch.Tensor | None = None
        self._plan: FirstPassPlan | None = None

    def load_model(self, target_model: nn.Module) -> None:
        """Load the head; the row table is allocated here, before memory is profiled."""
        if not reads_embeddings(self.vllm_config):
            # The draft reads image features itself; vLLM would warn that it gets none.
            self.supports_mm_inputs = False
        super().load_model(target_model)
        give_own_lm_head(self.model)
        self.draft_rows = DraftRows(self.model, self.max_batch_size)
        clear_with(self._runner, "reset_encoder_cache", self.draft_rows.clear)

    def set_inputs_first_pass(self, *args: Any, **kwargs: Any) -> Any:
        """Fill row codes after vLLM has laid out the first draft pass."""
        width = self.hidden_states.shape[1]
        kwargs["target_hidden_states"] = kwargs["target_hidden_states"][:, :width]
        num_tokens, token_indices, metadata = super().set_inputs_first_pass(*args, **kwargs)
        self._first_draft_rows = token_indices
        batch = self._runner.input_batch
        first_rows = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
        holds = self.draft_rows.holds(batch.req_ids, first_rows, int(metadata.num_actual_tokens))
        if holds and self.num_speculative_tokens:
            return num_tokens, token_indices, metadata
        starts = metadata.query_start_loc_cpu.tolist()
        self.draft_rows.fill(
            self._requests(starts), self._runner.encoder_cache, self.hidden_states[:num_tokens]
        )
        on_cpu = current_platform.is_cpu()
        nothing_drafted = on_cpu and self.num_speculative_tokens == 0
        self._plan = self.draft_rows.sample_at(
            token_indices, sampled_ask=on_cpu and not nothing_drafted, keys_only=nothing_drafted
        )
        return num_tokens, token_indices, metadata

    def build_per_group_and_layer_attn_metadata(
        self, common_attn_metadata: Any, draft_index: int = 0
    ) -> Any:
        """Where only the sampled rows of the first pass ask, describe them as one-token queries."""
        plan, self._plan = self._plan, None
        if plan is not None and plan.sampled_ask:
            common_attn_metadata = self._sampled_rows(common_attn_metadata, plan)
        return super().build_per_group_and_layer_attn_metadata(common_attn_metadata, draft_index)

    def _sampled_rows(self, metadata: Any, plan: FirstPassPlan) -> Any:
        """Return a copy of the batch's metadata for one query a request, vLLM's own untouched."""
        num_reqs = metadata.batch_size()
        behind_R = metadata.query_start_loc[1 : num_reqs + 1] - 1 - plan.sampled
        return replace(
            metadata,
            query_start_loc=self.arange[: num_reqs + 1],
            query_start_loc_cpu=torch.from_numpy(self.token_arange_np[: num_reqs + 1]).clone(),
            num_actual_tokens=num_reqs,
            max_query_len=1,
            # Rejected tokens behind a sampled row are no keys of its.
            seq_lens=(metadata.seq_lens[:num_reqs] - behind_R).to(metadata.seq_lens.dtype),
        )

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Remember which tokens stay where rejected ones are dropped (unpadded batches only)."""
        metadata, self._kept_tokens = super().prepare_inputs(*args, **kwargs)
        return metadata, self._kept_tokens

    def build_model_inputs_first_pass(
        self, num_tokens: int, num_input_tokens: int, mm_embed_inputs: Any
    ) -> Any:
        """Drop the rejected tokens from the mask of image tokens too (unpadded batches only)."""
        kept, self._kept_tokens = self._kept_tokens, None
        if mm_embed_inputs is not None and kept is not None:
            embeddings, is_image_T = mm_embed_inputs
            mm_embed_inputs = embeddings, is_image_T[kept.cpu()]
        return super().build_model_inputs_first_pass(num_tokens, num_input_tokens, mm_embed_inputs)

    def _set_positions(self, num_tokens: int, positions: torch.Tensor) -> None:
        """Take plain positions ``[T]`` where the target's are M-RoPE; the draft's never are (4.7).

        The runner keeps them on the device for its slot mapping, right under asynchronous
        scheduling too.
        """
        if self.vllm_config.model_config.uses_mrope:
            kept = slice(num_tokens) if self._kept_tokens is None else self._kept_tokens
            positions = self._runner.positions[kept]
        self.positions[:num_tokens] = positions

    def _requests(self, starts: list[int]) -> list[RequestRows]:
        batch, states = self._runner.input_batch, self._runner.requests
        return [
            RequestRows(
                request_id=request_id,
                features=states[request_id].mm_features,
                first_row=int(batch.num_computed_tokens_cpu[index]),
                num_rows=starts[index + 1] - starts[index],
                num_prompt_tokens=int(batch.num_prompt_tokens[index]),
            )
            for index, request_id in enumerate(batch.req_ids)
        ]

    def _update_positions_dependent_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Before the first one-token step, keep each request's last code."""
        if self._first_draft_rows is not None:
            self.draft_rows.gather(self._first_draft_rows)
            self._first_draft_rows = None
        return super()._update_positions_dependent_metadata(*args, **kwargs)

    def prepare_next_token_ids_padded(self, *args: Any, **kwargs: Any) -> Any:
        """Give an unfinished prompt the token that follows its chunk.

        vLLM hands every such request its last prompt token, which leaves one wrong row per chunk
        border in the draft's cache.  Host state is exact for unfinished prompts.
        """
        next_token_ids, counts = super().prepare_next_token_ids_padded(*args, **kwargs)
        batch, states = self._runner.input_batch, self._runner.requests
        unfinished = self._runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        if unfinished:
            seq_lens = self._runner.optimistic_seq_lens_cpu
            tokens = [states[batch.req_ids[i]].get_token_id(int(seq_lens[i])) for i in unfinished]
            next_token_ids[unfinished] = torch.tensor(
                tokens, dtype=next_token_ids.dtype, device=next_token_ids.device
            )
        return next_token_ids, counts

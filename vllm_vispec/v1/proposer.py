"""ViSpec on the V1 model runner, which is also the CPU's.

Goes with that runner, which vLLM calls deprecated: once the oldest vLLM we support has none, this
folder is deleted.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.v1.spec_decode.eagle import EagleProposer

from vllm_vispec.compat.patching import patch
from vllm_vispec.config import ViSpecConfig, reads_embeddings, reads_target_states
from vllm_vispec.draft_vocab.model import give_own_lm_head
from vllm_vispec.heads.location import loaded_from_folder
from vllm_vispec.models.vispec import scale_shared_embedding
from vllm_vispec.scheduling.control import Sleep
from vllm_vispec.spec_decode.draft_rows import DraftRows
from vllm_vispec.spec_decode.step import RequestRows
from vllm_vispec.spec_decode.target_parts import findable_parts


def staying_rows(starts_R1: torch.Tensor, new_starts_R1: torch.Tensor) -> torch.Tensor:
    """Return which rows of a batch stay, int64 ``[T]``.

    Args:
        starts_R1: On the host; where the requests begin, and behind the last one the batch's end.
        new_starts_R1: The same once each request has lost rows at its end.
    """
    dropped_before_R = (starts_R1 - new_starts_R1)[:-1].long()
    new_rows_T = torch.arange(int(new_starts_R1[-1]))
    return new_rows_T + dropped_before_R.repeat_interleave(new_starts_R1.diff())


class ViSpecProposer(EagleProposer):
    """vLLM's EAGLE proposer, with a row id for every token of the batch and plain 1-D positions."""

    draft_rows: DraftRows
    hidden_states: torch.Tensor

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        if not reads_target_states(vllm_config):
            # vLLM copies as many columns of the target's states as this buffer has.
            self.hidden_states = self.hidden_states.new_empty(self.max_num_tokens, 0)
        self._runner = runner
        # None: K does not follow load and acceptance.
        self._sleep = Sleep() if ViSpecConfig.from_vllm(vllm_config).adaptive else None
        self._first_draft_rows: torch.Tensor | None = None
        # Which rows stay where rejected tokens are dropped, on the device and on the host.
        self._staying_rows: tuple[torch.Tensor, torch.Tensor] | None = None

    def load_model(self, target_model: nn.Module) -> None:
        """Load the head; the row table is allocated here, before memory is profiled."""
        if not reads_embeddings(self.vllm_config):
            # The draft reads image features itself; vLLM would warn that it gets none.
            self.supports_mm_inputs = False
        with (
            loaded_from_folder(self.speculative_config.draft_model_config) as folder,
            findable_parts(target_model),
        ):
            super().load_model(target_model)
        give_own_lm_head(self.model, folder)
        scale_shared_embedding(self.model, self.vllm_config.model_config)
        self.draft_rows = self.make_draft_rows()
        patch(self._runner, "reset_encoder_cache", self.draft_rows.reset_encoder_cache)

    def make_draft_rows(self) -> Any:
        """Return what lays a batch's rows out."""
        return DraftRows(self.model, self.max_batch_size, self.vllm_config.kv_transfer_config)

    def propose(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Draft as EAGLE does; nothing at all while asleep."""
        next_tokens_R = kwargs["next_token_ids"]
        has_one_token_each = len(kwargs["target_token_ids"]) == len(next_tokens_R)
        k = num_speculative_tokens
        if self._sleep is not None and self._sleep.saw(k, has_one_token_each):
            return next_tokens_R.new_empty(len(next_tokens_R), 0)
        drafts: torch.Tensor = super().propose(num_speculative_tokens, *args, **kwargs)
        return drafts

    def set_inputs_first_pass(self, *args: Any, **kwargs: Any) -> Any:
        """Set the rows after vLLM has laid out the first draft pass."""
        width = self.hidden_states.shape[1]
        kwargs["target_hidden_states"] = kwargs["target_hidden_states"][:, :width]
        num_tokens, token_indices, metadata = super().set_inputs_first_pass(*args, **kwargs)
        self._first_draft_rows = token_indices
        batch = self._runner.input_batch
        first_rows = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
        num_rows = int(metadata.num_actual_tokens)
        if not self.draft_rows.serves_step(batch.req_ids, first_rows, num_rows):
            requests = self._requests(metadata.query_start_loc_cpu.tolist())
            states = self.hidden_states[:num_tokens]
            self.draft_rows.set_step(requests, self._runner.encoder_cache, states)
        return num_tokens, token_indices, metadata

    def prepare_inputs(self, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        """Remember which tokens stay where rejected ones are dropped (unpadded batches only)."""
        metadata, rows = super().prepare_inputs(common_attn_metadata, *args, **kwargs)
        starts = common_attn_metadata.query_start_loc_cpu, metadata.query_start_loc_cpu
        self._staying_rows = rows, staying_rows(*starts)
        return metadata, rows

    def build_model_inputs_first_pass(
        self, num_tokens: int, num_input_tokens: int, mm_embed_inputs: Any
    ) -> Any:
        """Drop the rejected tokens from the mask of image tokens too (unpadded batches only)."""
        staying, self._staying_rows = self._staying_rows, None
        if mm_embed_inputs is not None and staying is not None:
            embeddings, is_image_T = mm_embed_inputs
            mm_embed_inputs = embeddings, is_image_T[staying[1]]
        return super().build_model_inputs_first_pass(num_tokens, num_input_tokens, mm_embed_inputs)

    def _set_positions(self, num_tokens: int, positions: torch.Tensor) -> None:
        """Take plain positions ``[T]`` where the target's are M-RoPE; the draft's never are.

        The runner keeps them on the device for its slot mapping, right under asynchronous
        scheduling too.
        """
        if self.vllm_config.model_config.uses_mrope:
            staying = self._staying_rows
            rows = slice(num_tokens) if staying is None else staying[0]
            positions = self._runner.positions[rows]
        self.positions[:num_tokens] = positions

    def _requests(self, starts: list[int]) -> list[RequestRows]:
        batch, states = self._runner.input_batch, self._runner.requests
        has_gate = self.draft_rows.gate is not None
        return [
            RequestRows(
                request_id=request_id,
                features=states[request_id].mm_features,
                first_row=int(batch.num_computed_tokens_cpu[index]),
                num_rows=starts[index + 1] - starts[index],
                num_prompt_tokens=int(batch.num_prompt_tokens[index]) if has_gate else 0,
            )
            for index, request_id in enumerate(batch.req_ids)
        ]

    def _update_positions_dependent_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Before the first one-token step, keep each request's last row."""
        if self._first_draft_rows is not None:
            self.draft_rows.begin_steps(self._first_draft_rows)
            self._first_draft_rows = None
        return super()._update_positions_dependent_metadata(*args, **kwargs)

    def prepare_next_token_ids_padded(self, *args: Any, **kwargs: Any) -> Any:
        """Give an unfinished prompt the token that follows its chunk.

        vLLM gives every such request its last prompt token, which leaves one wrong row per chunk
        border in the draft's cache.  It looks that token up at the end of the request's tokens as
        the batch counts them, on the host, which is exact for unfinished prompts.  So the count is
        that of the chunk while vLLM looks, and nothing more is copied to the device.
        """
        batch, runner = self._runner.input_batch, self._runner
        unfinished = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0]
        counts = batch.num_tokens_no_spec
        whole = counts[unfinished]
        counts[unfinished] = runner.optimistic_seq_lens_cpu.numpy()[unfinished] + 1
        try:
            return super().prepare_next_token_ids_padded(*args, **kwargs)
        finally:
            counts[unfinished] = whole

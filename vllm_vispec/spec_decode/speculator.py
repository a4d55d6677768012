"""ViSpec on the V2 model runner, vLLM's default on GPUs."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator

from vllm_vispec.compat.patching import patch
from vllm_vispec.compressors.gated import PromptLengths
from vllm_vispec.config import ViSpecConfig, reads_target_states, trims_drafts
from vllm_vispec.draft_vocab.model import give_own_lm_head
from vllm_vispec.heads.location import loaded_from_folder
from vllm_vispec.models.vispec import scale_shared_embedding
from vllm_vispec.scheduling.control import Sleep
from vllm_vispec.spec_decode.draft_rows import DraftRows
from vllm_vispec.spec_decode.step import RequestRows
from vllm_vispec.spec_decode.target_parts import findable_parts
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)


class ViSpecSpeculator(EagleSpeculator):
    """vLLM's EAGLE speculator, with a row id for every token of the batch."""

    draft_rows: DraftRows
    hidden_states: torch.Tensor
    # None: K does not follow load and acceptance.
    _sleep: Sleep | None = None

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        if not reads_target_states(vllm_config):
            # vLLM copies as many columns of the target's states as this buffer has.
            self.hidden_states = self.hidden_states.new_empty(self.max_num_tokens, 0)

    def load_model(self, target_model: nn.Module) -> None:
        """Load the head; all buffers exist before any graph is captured."""
        with (
            loaded_from_folder(self.speculative_config.draft_model_config) as folder,
            findable_parts(target_model),
        ):
            super().load_model(target_model)
        give_own_lm_head(self.model, folder)
        scale_shared_embedding(self.model, self.vllm_config.model_config)
        takes_images = self.vllm_config.model_config.supports_multimodal_inputs
        if takes_images and not self.supports_mm_inputs:
            logger.info(
                "ViSpec reads image features itself; vLLM's notice above does not apply to it."
            )
        self.draft_rows = self.make_draft_rows()
        self._prompts = PromptLengths(self.max_num_reqs)
        self._trims_drafts = trims_drafts(self.vllm_config)
        self._sleep = Sleep() if ViSpecConfig.from_vllm(self.vllm_config).adaptive else None
        # None before `set_attn`, and where the engine takes text only: then no request has images.
        self._encoder_cache: EncoderCache | None = None

    def make_draft_rows(self) -> Any:
        """Return what lays a batch's rows out."""
        return DraftRows(self.model, self.max_num_reqs, self.vllm_config.kv_transfer_config)

    def set_attn(self, model_state: Any, *args: Any, **kwargs: Any) -> None:
        """Learn where the vision tower's output is kept, if the engine takes images at all."""
        super().set_attn(model_state, *args, **kwargs)
        if self.draft_rows.gate is not None:
            self._prompts.follow(model_state)
        if model_state.supports_mm_inputs:
            cache = self._encoder_cache = model_state.encoder_cache
            patch(cache, "reset_encoder_cache", self.draft_rows.reset_encoder_cache)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Say so if draft steps will not be recorded although the target's passes are."""
        super().init_cudagraph_manager(cudagraph_mode)
        is_recorded = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        if cudagraph_mode != CUDAGraphMode.NONE and not is_recorded:
            _note_eager_steps(cudagraph_mode.name)

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        *args: Any,
        step_draft_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Lay the batch's rows out, then draft as EAGLE does; nothing at all while asleep.

        Args:
            step_draft_tokens: Draft tokens of the step, where they are not all drafted in here;
                None: ``num_speculative_tokens``.
        """
        has_one_token_each = int(input_batch.num_tokens) == input_batch.num_reqs
        k = step_draft_tokens
        if k is None:
            k = kwargs.get("num_speculative_tokens")
        if self._sleep is not None and self._sleep.saw(k, has_one_token_each):
            return self.draft_tokens[: input_batch.num_reqs]
        self._set_rows(input_batch, last_hidden_states)
        read_TD = last_hidden_states[:, : self.hidden_states.shape[1]]
        return super().propose(input_batch, attn_metadata, slot_mappings, read_TD, *args, **kwargs)

    def _set_rows(self, input_batch: InputBatch, hidden_states: torch.Tensor) -> None:
        """Set the rows of a batch, unless the device holds them already."""
        count, cache = input_batch.num_reqs, self._encoder_cache
        first_rows = input_batch.num_computed_tokens_np[:count].tolist()
        ids, num_rows = input_batch.req_ids[:count], int(input_batch.num_tokens)
        if not self.draft_rows.serves_step(ids, first_rows, num_rows):
            features = {} if cache is None else cache.mm_features
            outputs = {} if cache is None else cache.encoder_outputs
            requests = _requests(input_batch, features, self._prompts)
            self.draft_rows.set_step(requests, outputs, hidden_states)
        moved = moved_rows(input_batch) if self._trims_drafts else None
        if moved is not None:
            self.draft_rows.select_rows(moved)

    def on_prefill_end(self, num_reqs: int) -> None:
        """Keep each request's last row for the one-token steps; outside any graph."""
        super().on_prefill_end(num_reqs)
        self.draft_rows.begin_steps(self.last_token_indices[:num_reqs])


@lru_cache
def _note_eager_steps(cudagraph_mode: str) -> None:
    """Once: vLLM asks what to record when it profiles its memory, and again."""
    logger.warning(
        "ViSpec: the steps of chains run without CUDA graphs, kernel by kernel, since "
        "cudagraph_mode=%s records no whole decoding passes; FULL_AND_PIECEWISE does",
        cudagraph_mode,
    )


def _requests(
    input_batch: InputBatch, features: dict[str, Any], prompts: PromptLengths
) -> list[RequestRows]:
    starts = input_batch.query_start_loc_np[: input_batch.num_reqs + 1].tolist()
    computed = input_batch.num_computed_tokens_np[: input_batch.num_reqs].tolist()
    return [
        RequestRows(
            request_id=request_id,
            # Dummy batches invent request ids.
            features=features.get(request_id, ()),
            first_row=computed[index],
            num_rows=starts[index + 1] - starts[index],
            num_prompt_tokens=prompts.length_of(request_id),
        )
        for index, request_id in enumerate(input_batch.req_ids[: input_batch.num_reqs])
    ]


def moved_rows(batch: InputBatch) -> torch.Tensor | None:
    """Return, for every row of the requests with drafts, a row of the same request.

    Adaptive verification trims drafts. The host knows how many draft tokens are verified in all and
    spreads them evenly; how many each request keeps is decided on the device and never read back.
    Requests with drafts come first, so everything behind them lies where the host thinks. A request
    with drafts is past its prompt, so all its rows have one id, and only the borders between such
    requests have to be moved.

    Returns:
        int64 ``[V]`` on the device: indices into the batch as the host laid it out. None if the
        host's layout is the true one.
    """
    drafts_R = batch.num_draft_tokens_per_req
    if drafts_R is None or not 0 < batch.num_draft_tokens < int(drafts_R.sum()):
        return None
    count = int(np.count_nonzero(drafts_R[: batch.num_reqs]))
    starts = batch.query_start_loc_np[: count + 1].astype(np.int64)
    ends_V = batch.query_start_loc[1 : count + 1]
    rows_V = torch.arange(int(starts[-1]), device=ends_V.device, dtype=ends_V.dtype)
    owner_V = torch.searchsorted(ends_V, rows_V, right=True)
    return async_tensor_h2d(starts[:-1], ends_V.device)[owner_V]

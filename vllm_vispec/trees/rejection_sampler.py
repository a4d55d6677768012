"""V2's rejection sampler over rows of tree nodes.

Shapes: R requests, S rows of logits, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from vllm.config import SpeculativeConfig
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_vispec.trees.cudagraph import RecordedVerification
from vllm_vispec.trees.verify import EngineTrees, TreeBatch


class TreeRejectionSampler(RejectionSampler):
    """Samples the target's token behind every node and follows the nodes that hold it.

    A sample is keyed by the request's seed and the position on the path, so it is the one that
    plain decoding would have drawn there.

    Args:
        sampler: vLLM's.
        speculative_config: The engine's.
        device: Where logits lie.
        trees: The engine's.
        recorded: Verifies whole batches.
    """

    def __init__(
        self,
        sampler: Sampler,
        speculative_config: SpeculativeConfig,
        device: torch.device,
        trees: EngineTrees,
        recorded: RecordedVerification,
    ) -> None:
        super().__init__(sampler, speculative_config, device)
        self._trees, self._recorded = trees, recorded
        self._num_rows_done = 0

    def __call__(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what vLLM's sampler returns."""
        self._trees.end_target_pass()
        self._num_rows_done = 0
        return super().__call__(logits, *args, **kwargs)

    def _verify(
        self,
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits ``[S, V]``, tokens ``[R, N + 1]`` and how many of them count ``[R]``."""
        num_rows = logits.shape[0]
        batch = self._trees.batch_part(self._num_rows_done, num_rows, idx_mapping, cu_num_logits)
        self._num_rows_done += num_rows
        # vLLM reads rows of logits behind verification for these alone.
        states = self.sampler.sampling_states
        reads_rows = self.sampler.return_sampling_mask or (
            states.max_num_logprobs(idx_mapping_np) != NO_LOGPROBS
        )
        sampled_S, scaled_SV = self.sampler.sample(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos + batch.position_shift.to(pos.dtype),
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
            return_logprobs=reads_rows,
        )
        # What is recorded overwrites its last result, which the other parts of a batch still need.
        verify = self._recorded.verify if batch is self._trees.batch else TreeBatch.verify
        found, moves = verify(batch, sampled_S, verify_draft_sampled)
        self._trees.note_accepted(batch, moves)
        if reads_rows:
            # It takes the rows of accepted tokens to be consecutive.
            for rows in (logits,) if scaled_SV is logits else (logits, scaled_SV):
                rows[moves.place] = rows[moves.source]
        num_requests, num_tokens = found.token.shape
        tokens = sampled_S.new_zeros(num_requests, self.num_speculative_steps + 1)
        tokens[:, :num_tokens] = found.token.clamp(min=0)
        return scaled_SV, tokens, (found.num_accepted + 1).int()

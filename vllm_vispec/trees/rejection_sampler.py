"""V2's rejection sampler over rows of tree nodes.

Shapes: R requests, S rows of logits, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

if TYPE_CHECKING:
    from vllm_vispec.trees.model_state import StateTrees


class TreeRejectionSampler(RejectionSampler):
    """Samples the target's token behind every node and walks down.

    A draw is keyed by the request's seed and the position of its path, so it is the one plain
    decoding would have made there.
    """

    trees: "StateTrees"

    def __call__(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what vLLM's sampler returns; what follows finds accepted paths in front."""
        self.trees.end_pass()
        self._first_row = 0
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
        scaled_SV = self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        batch = self.trees.part(self._first_row, logits.shape[0], idx_mapping, cu_num_logits)
        self._first_row += logits.shape[0]
        states = self.sampler.sampling_states
        sampled_S = gumbel_sample(
            scaled_SV,
            expanded_idx_mapping,
            states.temperature.gpu,
            states.seeds.gpu,
            pos + batch.position_shift.to(pos.dtype),
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self.sampler.use_fp64_gumbel,
        )
        found, moves = self.trees.walk(batch, sampled_S, verify_draft_sampled)
        self.trees.note(batch, moves)
        if self.sampler.return_sampling_mask or (
            states.max_num_logprobs(idx_mapping_np) != NO_LOGPROBS
        ):
            # vLLM reads them in consecutive rows.
            for rows in (logits,) if scaled_SV is logits else (logits, scaled_SV):
                rows[moves.place] = rows[moves.source]
        num_requests, num_tokens = found.token.shape
        tokens = sampled_S.new_zeros(num_requests, self.num_speculative_steps + 1)
        tokens[:, :num_tokens] = found.token.clamp(min=0)
        return scaled_SV, tokens, (found.accepted + 1).int()

"""Single paths on the V2 model runner, each of which ends where its draft is unsure.

A chain is drafted at full length, in vLLM's graphs.  Beside every draft token the policy judges the
path down to it, as on V1, and how many tokens come before the end stays on the device.  The rows
behind it are marked as vLLM marks drafts that a grammar did not see: they are not verified, and the
token at the end is the target's own, drawn as without a draft.

Shapes: R requests, C tokens that the policy looks at, V vocabulary, S rows of logits.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import SpeculativeConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_vispec.spec_decode.speculator import ViSpecSpeculator
from vllm_vispec.trees.grow import likeliest
from vllm_vispec.trees.limits import has_paths, settings_of
from vllm_vispec.trees.policies import NEVER, POLICIES
from vllm_vispec.trees.settings import TreeSettings


class PathEnds:
    """Where the paths of a batch end, in buffers that recorded graphs know.

    Args:
        settings: How paths grow.
        max_num_requests: Most requests of a batch.
        device: Where drafts lie.

    Attributes:
        length: int64 ``[R]``; tokens before the end, of those drafted so far.
    """

    def __init__(self, settings: TreeSettings, max_num_requests: int, device: torch.device) -> None:
        self._policy = POLICIES[settings.policy](settings.one_branch())
        logp_RC = torch.zeros(max_num_requests, self._policy.num_observed, device=device)
        self.length = torch.zeros_like(logp_RC[:, 0], dtype=torch.int64)
        self._score, self._observed = logp_RC[:, :1].clone(), self._policy.observe(logp_RC)

    def go_on(self, logits: torch.Tensor, step: torch.Tensor) -> None:
        """Judge the next token of the first R paths, their likeliest.

        A graph of one draft step serves all steps, so which one it is stays on the device.

        Args:
            logits: ``[R, V]``.
            step: int64 ``[]``; 0 where paths begin.
        """
        begins, num_requests = step == 0, logits.shape[0]
        length_R, score_R1, observed = (
            rows[:num_requests] for rows in (self.length, self._score, self._observed)
        )
        logp_R1C, _ = likeliest(logits.unsqueeze(1), self._policy.num_observed)
        parent_R1 = score_R1.masked_fill(begins, 0)
        observed.copy_(torch.where(begins, self._policy.observe(logp_R1C[:, 0]), observed))
        child_R11 = parent_R1.unsqueeze(-1) + logp_R1C[..., :1]
        keep_R11, expand_R11 = self._policy.judge(step + 1, child_R11, parent_R1, observed)
        score_R1.copy_(expand_R11[:, 0])
        # Nothing grows behind the end, so what is kept is the path's beginning.
        length_R.copy_(length_R.masked_fill(begins, 0) + (keep_R11[:, 0, 0] != NEVER))


class PathSpeculator(ViSpecSpeculator):
    """vLLM's chains, each with its end; trees are grown by a subclass."""

    # None: no load drafts single paths that may end early.
    ends: PathEnds | None = None
    # By request slot.  None until attention is set up, and where trees know where chains end.
    path_length: torch.Tensor | None = None

    def load_model(self, target_model: nn.Module) -> None:
        """Load the head."""
        super().load_model(target_model)
        if has_paths(self.vllm_config):
            settings = settings_of(self.vllm_config)
            self.ends = PathEnds(settings, self.max_num_reqs, self.device)
            # It would give tokens without logits.
            self.use_local_argmax_reduction = False

    def set_attn(self, model_state: Any, *args: Any, **kwargs: Any) -> None:
        """Find what the sampler reads."""
        super().set_attn(model_state, *args, **kwargs)
        self.path_length = getattr(model_state, "path_length", None)

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Draft as vLLM does, and keep where paths end until they are verified."""
        inputs = input_batch, attn_metadata, slot_mappings, last_hidden_states
        drafts = super().propose(*inputs, *args, dummy_run=dummy_run, **kwargs)
        if self.ends is not None and self.path_length is not None and not dummy_run:
            length_R = self.ends.length[: input_batch.num_reqs]
            self.path_length[input_batch.idx_mapping] = length_R
        return drafts

    def _maybe_predict_acceptance(
        self, logits: torch.Tensor, idx_mapping: torch.Tensor, draft_step: torch.Tensor
    ) -> None:
        """Judge the draft token that these logits give, inside the graphs of draft steps."""
        super()._maybe_predict_acceptance(logits, idx_mapping, draft_step)
        if self.ends is not None:
            self.ends.go_on(logits, draft_step)

    def observe_verification(
        self, idx_mapping: torch.Tensor, num_sampled: torch.Tensor, num_rejected: torch.Tensor
    ) -> None:
        """Keep what adaptive verification expects of the target free of what we cut."""
        if self._trims_drafts and self.path_length is not None:
            # All before the end were accepted: the next one was not rejected by the target.
            ended_R = num_sampled > self.path_length[idx_mapping]
            num_rejected = num_rejected.masked_fill(ended_R, 0)
        super().observe_verification(idx_mapping, num_sampled, num_rejected)


class PathRejectionSampler(RejectionSampler):
    """vLLM's, which verifies each path up to its end.

    Args:
        sampler: vLLM's.
        speculative_config: The engine's.
        device: Where logits lie.
        length: int64, by request slot; tokens before the end of each path.
    """

    def __init__(
        self,
        sampler: Sampler,
        speculative_config: SpeculativeConfig,
        device: torch.device,
        length: torch.Tensor,
    ) -> None:
        super().__init__(sampler, speculative_config, device)
        self._length = length

    def __call__(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,
    ) -> Any:
        """Return what vLLM's sampler returns."""
        # A request's row i holds its draft token i, counted from 1; row 0 holds none.
        place_S, slot_S = input_batch.expanded_local_pos, input_batch.expanded_idx_mapping
        is_cut_S = place_S > self._length[slot_S]
        if invalid_drafts is not None:
            is_cut_S |= invalid_drafts
        return super().__call__(logits, input_batch, draft_logits, is_cut_S)

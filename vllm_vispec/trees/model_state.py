"""Trees and paths around the target's pass on V2: what comes before it, their samplers behind it.

Shapes: R requests of a batch, N nodes, S rows of logits, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from vllm.config import SpeculativeConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_vispec.trees.attention import make_engine_trees, target_layers
from vllm_vispec.trees.cudagraph import RecordedVerification
from vllm_vispec.trees.limits import has_branches, has_paths, requires_linear_draft
from vllm_vispec.trees.paths import PathRejectionSampler
from vllm_vispec.trees.verify import EngineTrees, TreeBatch
from vllm_vispec.utils.errors import ViSpecError


def resolve_model_state_cls(original: Callable[..., Any], vllm_config: Any, model: Any) -> Any:
    """Stands for vLLM's function; engines without trees get the class that it returns."""
    cls = original(vllm_config, model)
    if has_branches(vllm_config):
        return tree_model_state(cls)
    return path_model_state(cls) if has_paths(vllm_config) else cls


@lru_cache
def path_model_state(base: Any) -> Any:
    """Return a subclass of a model state whose targets verify paths up to their ends."""

    class PathModelState(base):
        """Keeps where paths end.

        Attributes:
            path_length: int64, by request slot; tokens before the end.
        """

        def custom_sampler(self, sampler: Any) -> Any:
            _refuse_own(super().custom_sampler(sampler), base)
            self.path_length = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=self.device)
            speculative = self.vllm_config.speculative_config
            return sampler, PathRejectionSampler(
                sampler, speculative, self.device, self.path_length
            )

    return PathModelState


def _refuse_own(samplers: Any, base: Any) -> None:
    if samplers is not None:
        raise ViSpecError(
            f"tree does not work with this target, which has a sampler of its own "
            f"({base.__name__}.custom_sampler); leave it out of the speculative config"
        )


@lru_cache
def tree_model_state(base: Any) -> Any:
    """Return a subclass of a model state whose targets verify trees."""

    class TreeModelState(base):
        """Has the engine's trees, and tells which requests must get chains.

        Attributes:
            trees: The engine's; None until target and draft are loaded.
            recorded_verification: Its verification, as graphs hold it.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.trees: EngineTrees | None = None
            self._linear: set[str] = set()

        def custom_sampler(self, sampler: Any) -> Any:
            _refuse_own(super().custom_sampler(sampler), base)
            config, size, device = self.vllm_config, self.max_num_reqs, self.device
            trees = make_engine_trees(config, target_layers(config), size, device)
            recorded = RecordedVerification(trees.table, size, self.max_num_tokens)
            self.trees, self.recorded_verification = trees, recorded
            speculative = config.speculative_config
            return sampler, TreeRejectionSampler(sampler, speculative, device, trees, recorded)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
            inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
            assert self.trees is not None
            batch = None
            if input_batch.num_draft_tokens:
                batch = TreeBatch(
                    self.trees.table,
                    input_batch.idx_mapping,
                    input_batch.cu_num_logits,
                    input_batch.logits_indices.long(),
                    input_batch.num_tokens,
                )
            positions = inputs.get("positions", input_batch.positions)
            self.trees.begin_target_pass(batch, positions)
            return inputs

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            if requires_linear_draft(new_req_data.sampling_params):
                self._linear.add(new_req_data.req_id)

        def remove_request(self, req_id: str) -> None:
            self._linear.discard(req_id)
            super().remove_request(req_id)

        def linear_requests(self, req_ids: Sequence[str]) -> torch.Tensor | None:
            """Return which requests must get chains, bool ``[R, 1]``; None if none must."""
            flags = [req_id in self._linear for req_id in req_ids]
            return async_tensor_h2d(flags, self.device).unsqueeze(1) if any(flags) else None

    return TreeModelState


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

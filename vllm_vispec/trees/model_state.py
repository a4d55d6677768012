"""Trees in V2's model state: positions and codes before the target's pass, and their sampler.

Shapes: R requests of a batch, N nodes.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_vispec.trees.attention import make_engine_trees, target_layers
from vllm_vispec.trees.cudagraph import RecordedVerification
from vllm_vispec.trees.limits import has_branches, requires_linear_draft
from vllm_vispec.trees.rejection_sampler import TreeRejectionSampler
from vllm_vispec.trees.verify import EngineTrees, TreeBatch
from vllm_vispec.utils.errors import ViSpecError


def resolve_model_state_cls(original: Callable[..., Any], vllm_config: Any, model: Any) -> Any:
    """Stands for vLLM's function; engines without trees get the class that it returns."""
    cls = original(vllm_config, model)
    return tree_model_state(cls) if has_branches(vllm_config) else cls


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
            self._is_linear: dict[str, bool] = {}

        def custom_sampler(self, sampler: Any) -> Any:
            if super().custom_sampler(sampler) is not None:
                raise ViSpecError(
                    f"tree does not work with this target, which has a sampler of its own "
                    f"({base.__name__}.custom_sampler); leave it out of the speculative config"
                )
            config, size = self.vllm_config, self.max_num_reqs
            self.trees = make_engine_trees(config, target_layers(config), size, self.device)
            self.recorded_verification = RecordedVerification(
                self.trees.table, size, self.max_num_tokens
            )
            return sampler, TreeRejectionSampler(
                sampler,
                config.speculative_config,
                self.device,
                self.trees,
                self.recorded_verification,
            )

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
            inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
            assert self.trees is not None
            batch = None
            if input_batch.num_draft_tokens:
                batch = TreeBatch.of_starts(
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
            self._is_linear[new_req_data.req_id] = requires_linear_draft(
                new_req_data.sampling_params
            )

        def remove_request(self, req_id: str) -> None:
            self._is_linear.pop(req_id, None)
            super().remove_request(req_id)

        def linear_requests(self, req_ids: Sequence[str]) -> torch.Tensor | None:
            """Return which requests must get chains, bool ``[R, 1]``; None if none must."""
            flags = [self._is_linear.get(req_id, False) for req_id in req_ids]
            return async_tensor_h2d(flags, self.device).unsqueeze(1) if any(flags) else None

    return TreeModelState

"""Trees on the V1 model runner: positions and codes before the pass, the accepted path after it.

Shapes: R requests of a batch, S rows of logits, T tokens of a batch, L levels.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_vispec.compat.patching import patch
from vllm_vispec.trees.attention import code_rows, settings_of
from vllm_vispec.trees.grow import NO_TOKEN, DraftTree
from vllm_vispec.trees.memory import find_target_cache
from vllm_vispec.trees.path_rules import ChainRequests
from vllm_vispec.trees.rounds import Moves, TreeRound, TreeTable
from vllm_vispec.v1.tree_sampler import TreeRejectionSampler


class RunnerChains:
    """Drafts of a V1 runner that are single paths, of any length; changes that one object.

    vLLM verifies them itself.

    Args:
        runner: vLLM's ``GPUModelRunner``, whose target is loaded.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        patch(runner, "_get_draft_token_ids_cpu", self._drafts_for_scheduler)
        patch(runner, "_input_fits_in_drafter", self._fits)

    def clear_codes(self) -> None:
        """Let all tokens be plain; here they always are."""

    def write_chains(self) -> None:
        """Let the drafts of the batch be plain rows; here they always are."""

    def _fits(self, original: Callable[..., bool], metadata: Any) -> bool:
        """Draft up to the longest sequence too.

        Near it the scheduler takes as many of a tree's nodes as fit, the best ones; vLLM would stop
        a whole tree's number of tokens before it, and for all requests of the batch.
        """
        return metadata is not None

    def _drafts_for_scheduler(
        self, original: Callable[..., tuple[list[list[int]], list[str]]]
    ) -> tuple[list[list[int]], list[str]]:
        """Cut the empty places behind trees and chains off what the host sees."""
        drafts, request_ids = original()
        return [_without_empty(tokens) for tokens in drafts], request_ids


class RunnerTrees(RunnerChains):
    """The trees of one V1 runner; changes that one object.

    Args:
        runner: vLLM's ``GPUModelRunner``, whose target is loaded.
        draft_layers: Names of the draft's attention layers.
    """

    def __init__(self, runner: Any, draft_layers: set[str]) -> None:
        super().__init__(runner)
        config = runner.vllm_config
        self.codes = code_rows(config)
        num_nodes = config.speculative_config.num_speculative_tokens
        self.table = TreeTable(settings_of(config), num_nodes, runner.max_num_reqs, runner.device)
        self.codes.table = self.table
        self.cache = find_target_cache(config, draft_layers)
        self._chains = ChainRequests()
        self._slots: dict[str, int] = {}
        self._round: TreeRound | None = None
        self._hidden: torch.Tensor | None = None
        self._slot_mapping: Mapping[str, torch.Tensor] = {}
        patch(runner, "_calc_spec_decode_metadata", self._begin)
        patch(runner, "_model_forward", self._forward)
        sampler = TreeRejectionSampler(runner.sampler, runner.speculative_config, runner.device)
        sampler.trees = self
        runner.rejection_sampler = sampler

    def clear_codes(self) -> None:
        """Let all tokens be plain."""
        self.codes.clear()

    def write(self, tree: DraftTree) -> None:
        """Keep the trees just drafted, requests in batch order."""
        ids = self._runner.input_batch.req_ids
        self.table.write(slice(len(ids)), tree)
        self._slots = {request_id: row for row, request_id in enumerate(ids)}

    def write_chains(self) -> None:
        """Let the drafts of the batch be plain rows, which vLLM verifies itself."""
        self._slots = {}

    def chain_rows(self) -> torch.Tensor | None:
        """Return which requests of the batch need a chain, bool ``[R, 1]``; None if none does."""
        ids, states = self._runner.input_batch.req_ids, self._runner.requests
        flags = self._chains.flags(ids, _Params(states))
        if not any(flags):
            return None
        return async_tensor_h2d(flags, self._runner.device).unsqueeze(1)

    def take_round(self) -> TreeRound | None:
        """Return the batch whose drafts are to be verified, once; None if it has none."""
        batch, self._round = self._round, None
        return batch

    def accept(self, batch: TreeRound, moves: Moves) -> None:
        """Move the accepted paths to the front: tokens, hidden states, keys and values."""
        source_A, place_A = batch.token_index[moves.source], batch.token_index[moves.place]
        assert self._hidden is not None
        for rows in (self._runner.input_ids.gpu, self._hidden):
            rows[place_A] = rows[source_A]
        self.cache.move(self._slot_mapping, source_A, place_A, moves.is_draft)
        self._hidden, self._slot_mapping = None, {}

    def _begin(
        self, original: Callable[..., Any], num_drafts: np.ndarray, cu_num_tokens: np.ndarray
    ) -> Any:
        """Find the tree of every request with drafts; none where a schedule asked for chains."""
        metadata = original(num_drafts, cu_num_tokens)
        self._round = None
        if self._slots and num_drafts.any():
            ids = self._runner.input_batch.req_ids
            slots = [self._slots.get(request_id, self.table.no_tree) for request_id in ids]
            host_2R = np.stack([np.array(slots), num_drafts]).astype(np.int64)
            slot_R, count_R = async_tensor_h2d(host_2R, self._runner.device)
            start_R = metadata.cu_num_sampled_tokens - count_R - 1
            self._round = TreeRound(
                self.table,
                slot_R,
                start_R,
                count_R,
                metadata.logits_indices.long(),
                int(cu_num_tokens[-1]),
            )
        # The next drafts overwrite the table.
        self._slots = {}
        return metadata

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the target; nodes have the positions of their levels and the codes of their paths."""
        batch = self._round
        if batch is None:
            self.codes.clear()
            return original(*args, **kwargs)
        # In place: recorded graphs read this memory.
        positions = kwargs["positions"]
        shift_S = batch.position_shift.to(positions.dtype).expand(*positions.shape[:-1], -1)
        positions.index_add_(-1, batch.token_index, shift_S)
        self.codes.set(batch.token_index, batch.path, batch.num_tokens)
        output = original(*args, **kwargs)
        self.codes.clear()
        # The draft, and slots, count tokens.
        positions.index_add_(-1, batch.token_index, shift_S, alpha=-1)
        self._hidden = output[0] if isinstance(output, tuple) else output
        self._slot_mapping = get_forward_context().slot_mapping
        return output


class _Params(Mapping[str, Any]):
    """Sampling parameters by request id, looked up where they are asked for."""

    def __init__(self, states: Mapping[str, Any]) -> None:
        self._states = states

    def __getitem__(self, request_id: str) -> Any:
        return self._states[request_id].sampling_params

    def __iter__(self) -> Any:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)


def _without_empty(tokens: list[int]) -> list[int]:
    count = len(tokens)
    while count and tokens[count - 1] == NO_TOKEN:
        count -= 1
    return tokens[:count]

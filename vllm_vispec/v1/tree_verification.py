"""Verifying trees on the V1 model runner: around the target's pass, and in its rejection sampler.

Shapes: R requests, S rows of logits (J of one request), V vocabulary, P nodes on the longest path
with the root.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler, apply_sampling_constraints
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_vispec.compat.patching import patch
from vllm_vispec.trees.grow import DraftTree
from vllm_vispec.trees.verify import EngineTrees, Moves, TreeBatch


class RunnerTrees:
    """The trees of one V1 runner, and the batch that its target verifies.

    Args:
        runner: vLLM's ``GPUModelRunner``, whose models are loaded; two methods of this one object
            are patched.
        trees: The engine's.
    """

    def __init__(self, runner: Any, trees: EngineTrees) -> None:
        self._runner, self._trees = runner, trees
        self._slots: dict[str, int] = {}
        self._hidden: torch.Tensor | None = None
        self._slot_mapping: Mapping[str, torch.Tensor] = {}
        patch(runner, "_calc_spec_decode_metadata", self._find_batch)
        patch(runner, "_model_forward", self._run_target)
        self.codes = trees.codes

    def write_trees(self, tree: DraftTree) -> None:
        """Keep the trees just drafted, those of the first requests of the batch."""
        ids = self._runner.input_batch.req_ids[: len(tree.token)]
        self._trees.table.write_trees(slice(len(ids)), tree)
        self._slots = {request_id: row for row, request_id in enumerate(ids)}

    def forget_trees(self) -> None:
        """Let the drafts of the batch be chains, which vLLM verifies itself."""
        self._slots = {}

    def take_batch(self) -> TreeBatch | None:
        """Return the batch whose drafts are to be verified, once; None if it has none."""
        batch, self._trees.batch = self._trees.batch, None
        return batch

    def move_accepted(self, batch: TreeBatch, moves: Moves) -> None:
        """Move the accepted paths to the front: tokens, hidden states, keys and values."""
        assert self._hidden is not None
        self._trees.note_accepted(batch, moves)
        self._trees.move_accepted(self._runner.input_ids.gpu, self._hidden, self._slot_mapping)
        self._hidden, self._slot_mapping = None, {}

    def _find_batch(
        self, original: Callable[..., Any], num_drafts: np.ndarray, cu_num_tokens: np.ndarray
    ) -> Any:
        """Find the tree of every request with drafts; none where a schedule asked for chains."""
        metadata = original(num_drafts, cu_num_tokens)
        self._trees.batch = None
        if self._slots and num_drafts.any():
            table, ids = self._trees.table, self._runner.input_batch.req_ids
            slots = [self._slots.get(request_id, table.no_tree) for request_id in ids]
            slot_R = async_tensor_h2d(slots, self._runner.device)
            starts = F.pad(metadata.cu_num_sampled_tokens, (1, 0))
            token_S, num_tokens = metadata.logits_indices.long(), int(cu_num_tokens[-1])
            self._trees.batch = TreeBatch(table, slot_R, starts, token_S, num_tokens)
        # The next drafts overwrite the table.
        self._slots = {}
        return metadata

    def _run_target(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the target; nodes have the positions of their levels and the codes of their paths."""
        self._trees.begin_target_pass(self._trees.batch, kwargs.get("positions"))
        output = original(*args, **kwargs)
        # The draft, and slots, count tokens.
        self._trees.end_target_pass()
        if self._trees.batch is not None:
            self._hidden = output[0] if isinstance(output, tuple) else output
            self._slot_mapping = get_forward_context().slot_mapping
        return output


class TreeRejectionSampler(RejectionSampler):
    """Samples the target's token behind every node and follows the nodes that hold it.

    Batches without trees are vLLM's.

    Args:
        sampler, speculative_config, device: As of vLLM's.
        trees: The runner's.
    """

    def __init__(
        self, sampler: Any, speculative_config: Any, device: Any, trees: RunnerTrees
    ) -> None:
        super().__init__(sampler, speculative_config, device)
        self._trees = trees

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Return the tokens of the accepted paths; what they were computed from moves in front."""
        batch = self._trees.take_batch()
        if batch is None:
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        each_row = _each_row(metadata)
        raw_SV = logits.float()
        # vLLM lets samplers change logits in place; the raw ones are read for log probabilities.
        reads_raw = (
            sampling_metadata.max_num_logprobs is not None and not self.is_processed_logprobs_mode
        )
        scaled_SV = self.apply_logits_processors(
            raw_SV.clone() if reads_raw else raw_SV,
            _with_last_row(sampling_metadata, metadata),
            each_row,
        )
        scaled_SV = apply_sampling_constraints(
            scaled_SV, each_row.cu_num_draft_tokens, sampling_metadata
        )
        sampled_S = self._sample(scaled_SV, batch, metadata.num_draft_tokens, sampling_metadata)
        found, moves = batch.verify(sampled_S, _draft_tokens(metadata))
        self._trees.move_accepted(batch, moves)
        tokens = found.token[:, : metadata.max_spec_len + 1].int().contiguous()
        shown_SV = raw_SV if reads_raw else scaled_SV
        logprobs = self._logprobs(metadata, sampling_metadata, shown_SV, moves, tokens)
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)

    def _sample(
        self,
        logits_SV: torch.Tensor,
        batch: TreeBatch,
        num_drafts: list[int],
        sampling: SamplingMetadata,
    ) -> torch.Tensor:
        """Sample one token for each row, ``[S]``.

        Rows of equal depth share their request's noise: a path has one node of a depth, so its
        samples are independent.  One request at a time, so that noise takes little memory.
        """
        greedy_S = logits_SV.argmax(-1)
        if sampling.all_greedy:
            return greedy_S
        depth_S = batch.depth.clamp(max=batch.table.levels)
        dtype = torch.float64 if self.use_fp64_gumbel else torch.float32
        drawn, counts = [], [count + 1 for count in num_drafts]
        parts = zip(logits_SV.split(counts), depth_S.split(counts), strict=True)
        for request, (logits_JV, depth_J) in enumerate(parts):
            # Without drafts one draw is all that plain decoding would take of its generator.
            num_depths = batch.table.levels + 1 if len(depth_J) > 1 else 1
            noise_PV = logits_JV.new_empty((num_depths, logits_JV.shape[1]), dtype=dtype)
            noise_PV.exponential_(generator=sampling.generators.get(request))
            probs_JV = logits_JV.softmax(-1, dtype=torch.float32)
            drawn.append((probs_JV / noise_PV[depth_J]).argmax(-1))
        drawn_S = torch.cat(drawn)
        if sampling.all_random:
            return drawn_S
        assert sampling.temperature is not None
        is_greedy_S = (sampling.temperature == 0)[batch.owner]
        return torch.where(is_greedy_S, greedy_S, drawn_S)

    def _logprobs(
        self,
        metadata: SpecDecodeMetadata,
        sampling: SamplingMetadata,
        logits_SV: torch.Tensor,
        moves: Moves,
        tokens: torch.Tensor,
    ) -> LogprobsTensors | None:
        """Return logprobs of the accepted paths, which vLLM reads in consecutive rows."""
        if sampling.max_num_logprobs is None:
            return None
        # In place: nobody reads the others.
        logits_SV[moves.place] = logits_SV[moves.source]
        return self._get_logprobs_tensors(
            sampling.max_num_logprobs,
            metadata,
            logits_SV,
            logits_SV[metadata.target_logits_indices],
            logits_SV[metadata.bonus_logits_indices],
            tokens,
        )


def _each_row(metadata: SpecDecodeMetadata) -> SpecDecodeMetadata:
    """Return metadata in which every row of logits counts as a draft's."""
    return replace(
        metadata,
        num_draft_tokens=[count + 1 for count in metadata.num_draft_tokens],
        cu_num_draft_tokens=metadata.cu_num_sampled_tokens,
    )


def _with_last_row(sampling: SamplingMetadata, metadata: SpecDecodeMetadata) -> SamplingMetadata:
    """Return sampling metadata whose drafts have one more token, so that all rows are counted."""
    given = sampling.spec_token_ids or [[] for _ in metadata.num_draft_tokens]
    longer = [
        [*tokens[:count], *[-1] * (count - len(tokens)), -1]
        for tokens, count in zip(given, metadata.num_draft_tokens, strict=False)
    ]
    return replace(sampling, spec_token_ids=longer)


def _draft_tokens(metadata: SpecDecodeMetadata) -> torch.Tensor:
    """Return each row's own draft token ``[S]``, -1 for roots."""
    token_S = torch.full_like(metadata.logits_indices, -1)
    token_S[metadata.target_logits_indices + 1] = metadata.draft_token_ids.to(token_S.dtype)
    return token_S

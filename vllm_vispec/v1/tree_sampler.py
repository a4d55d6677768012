"""V1's rejection sampler over rows of tree nodes.

Shapes: R requests, S rows of logits, V vocabulary, P nodes on the longest path with the root.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler, apply_sampling_constraints
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_vispec.trees.rounds import Moves, TreeRound

# Rows of so many elements are drawn at a time, 64 MiB in float32, one request's at least.
_MAX_ELEMENTS = 2**24

if TYPE_CHECKING:
    from vllm_vispec.v1.tree_runner import RunnerTrees


class TreeRejectionSampler(RejectionSampler):
    """Samples the target's token behind every node and walks down; else vLLM's own sampler."""

    trees: "RunnerTrees"

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Return the tokens of the accepted paths; what they were computed from moves in front."""
        batch = self.trees.take_round()
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
        found = batch.walk(sampled_S, _draft_tokens(metadata))
        moves = batch.moves(found)
        self.trees.accept(batch, moves)
        tokens = found.token[:, : metadata.max_spec_len + 1].int().contiguous()
        shown_SV = raw_SV if reads_raw else scaled_SV
        logprobs = self._logprobs(metadata, sampling_metadata, shown_SV, moves, tokens)
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)

    def _sample(
        self,
        logits_SV: torch.Tensor,
        batch: TreeRound,
        num_drafts: list[int],
        sampling: SamplingMetadata,
    ) -> torch.Tensor:
        """Draw one token for each row, ``[S]``; rows of equal depth share their request's noise.

        A walk visits one node of a depth, so its draws are independent.
        """
        greedy_S = logits_SV.argmax(-1)
        if sampling.all_greedy:
            return greedy_S
        num_depths, vocab = batch.table.levels + 1, logits_SV.shape[1]
        depth_S = batch.depth.clamp(max=num_depths - 1)
        drawn = []
        for requests, rows in _parts(num_drafts, num_depths, _MAX_ELEMENTS // vocab):
            noise_RPV = self._noise(requests, num_depths, num_drafts, sampling, logits_SV)
            owner_S = batch.owner[rows] - requests.start
            probs_SV = logits_SV[rows].softmax(-1, dtype=torch.float32)
            drawn.append((probs_SV / noise_RPV[owner_S, depth_S[rows]]).argmax(-1))
        drawn_S = torch.cat(drawn)
        if sampling.all_random:
            return drawn_S
        assert sampling.temperature is not None
        is_greedy_S = (sampling.temperature == 0)[batch.owner]
        return torch.where(is_greedy_S, greedy_S, drawn_S)

    def _noise(
        self,
        requests: range,
        num_depths: int,
        num_drafts: list[int],
        sampling: SamplingMetadata,
        logits_SV: torch.Tensor,
    ) -> torch.Tensor:
        """Return exponential noise ``[R, P, V]`` of some requests, with their own generators."""
        noise_RPV = torch.empty(
            (len(requests), num_depths, logits_SV.shape[1]),
            dtype=torch.float64 if self.use_fp64_gumbel else torch.float32,
            device=logits_SV.device,
        ).exponential_()
        for request in requests:
            generator = sampling.generators.get(request)
            if generator is not None:
                # Without drafts one draw is all that plain decoding would take.
                used = num_depths if num_drafts[request] else 1
                noise_RPV[request - requests.start, :used].exponential_(generator=generator)
        return noise_RPV

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


def _parts(
    num_drafts: Sequence[int], num_depths: int, max_rows: int
) -> Iterator[tuple[range, slice]]:
    """Yield requests and their rows of logits, so many that neither rows nor noise are too many."""
    starts = [0, *accumulate(count + 1 for count in num_drafts)]
    first = rows = 0
    for request, count in enumerate(num_drafts):
        own = max(count + 1, num_depths)
        if request > first and rows + own > max_rows:
            yield range(first, request), slice(starts[first], starts[request])
            first, rows = request, 0
        rows += own
    yield range(first, len(num_drafts)), slice(starts[first], starts[-1])


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


def _draft_tokens(metadata: SpecDecodeMetadata) -> Any:
    """Return each row's own draft token ``[S]``, -1 for roots."""
    token_S = torch.full_like(metadata.logits_indices, -1)
    token_S[metadata.target_logits_indices + 1] = metadata.draft_token_ids.to(token_S.dtype)
    return token_S

"""A gated compressor in the engine: which branches of its tokens each request's drafts see.

The gate reads the target's state of the last prompt token, in the step in which that token is in
the batch: once per request, whatever came before it from the cache. The decision stays on the
device under the request's id, also while the request waits preempted. Such a request may resume
behind its prompt, without that row, if the cache has the prompt.

A decision reaches the attention through head channels of its own. In a branch's channel the keys of
its tokens hold a constant and all other keys zero. A query holds its request's bias in the same
unit, so the score of such a key gets exactly the bias. The cached keys say only which branch they
are of; what a request makes of it comes with its queries.

Shapes: T tokens of the batch, C requests decided, K branches, D hidden size, P padded head size,
E = heads * P.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_vispec.compat.patching import patch
from vllm_vispec.compressors.compressor import ImageCompressor
from vllm_vispec.models.attention import MaskedAttention
from vllm_vispec.spec_decode.row_table import RowTable
from vllm_vispec.spec_decode.step import DraftStep, RowIds

# What a branch's keys hold in the branch's own channel; exact, and in reach of every dtype.
BRANCH_CHANNEL = 128.0
# Decisions that are remembered, those of requests that wait preempted among them.
DECISIONS_PER_REQUEST = 4
PROMPTS_PER_REQUEST = 8


def query_scale(head_dim: int) -> float:
    """What a bias is multiplied by to stand in a query; scores are divided by sqrt(head_dim)."""
    return float(head_dim**0.5 / BRANCH_CHANNEL)


class GatedRowTable(RowTable):
    """The row table of heads with a gate: also what keys and queries hold in branches' channels.

    A token's key says by its row id which branch it is of. How much a branch counts is the
    request's business, hence the query's: each row of the batch holds the biases of its request's
    decision. Decision 0 is that of requests nothing was decided for: all branches count as they
    are.

    Args:
        num_decisions: Decisions that are remembered, decision 0 included.
        Others: As of `RowTable`.
    """

    def __init__(
        self, ids: RowIds, hidden_size: int, max_num_tokens: int, num_decisions: int
    ) -> None:
        super().__init__(ids, hidden_size, max_num_tokens)
        self.num_decisions = num_decisions
        self.row_decisions: torch.Tensor
        self.branch_key: torch.Tensor
        self.branch_query: torch.Tensor
        self.batch_branch_key: torch.Tensor
        self.batch_branch_query: torch.Tensor
        self.add_zeros("row_decisions", max_num_tokens, dtype=torch.int32)
        for name, height in (("branch_key", ids.size), ("branch_query", num_decisions)):
            self.add_zeros(name, height, ids.num_branches)
            self.add_zeros(f"batch_{name}", max_num_tokens, ids.num_branches)
        self.branch_key[ids.branch(0) :].fill_diagonal_(BRANCH_CHANNEL)

    def write_decisions(self, decision_C: torch.Tensor, query_CK: torch.Tensor) -> None:
        """Write what the queries of decisions ``[C]`` hold in the branches' channels."""
        self.branch_query.index_copy_(0, decision_C, query_CK.to(self.branch_query.dtype))

    def set_step(self, step: DraftStep) -> None:
        """See `RowTable.set_step`."""
        super().set_step(step)
        assert step.decisions_T is not None
        num_tokens = len(step.decisions_T)
        decision_T = self.row_decisions[:num_tokens]
        decision_T.copy_(step.decisions_T, non_blocking=True)
        out = self.batch_branch_query[:num_tokens]
        torch.index_select(self.branch_query, 0, decision_T, out=out)

    def select_rows(self, token_indices: torch.Tensor) -> None:
        """See `RowTable.select_rows`."""
        super().select_rows(token_indices)
        batch = self.batch_branch_query
        batch[: token_indices.shape[0]] = batch[token_indices]

    def _pairs(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        return (*super()._pairs(), (self.branch_key, self.batch_branch_key))


class GatedAttention(MaskedAttention):
    """Hides masked positions, and adds the request's biases to the scores of branches' tokens.

    Args:
        rows: The draft's row table; has the batch's branch channels.
        Others: As of `MaskedAttention`.
    """

    rows: GatedRowTable

    def __init__(self, *args: Any, rows: GatedRowTable, **kwargs: Any) -> None:
        super().__init__(*args, rows=rows, num_branches=rows.ids.num_branches, **kwargs)

    def add_channels(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill the branches' channels; the projections leave zeros there."""
        for x_TE, batch in (
            (q, self.rows.batch_branch_query),
            (k, self.rows.batch_branch_key),
        ):
            self._channels(x_TE).add_(batch[: x_TE.shape[0]].unsqueeze(1))
        return q, k

    def _channels(self, x_TE: torch.Tensor) -> torch.Tensor:
        heads_THP = x_TE.view(x_TE.shape[0], -1, self.padded_size)
        return heads_THP[..., self.head_dim : self.head_dim + self.num_branches]


class GateDecisions:
    """Lets the gate decide, and remembers which row of the table has a request's decision.

    Args:
        compressor: A gated one.
        num_decisions: Rows of the table, row 0 ("nothing decided") included.
        head_dim: Of the draft's attention, unpadded.
    """

    def __init__(self, compressor: ImageCompressor, num_decisions: int, head_dim: int) -> None:
        self._compressor, self._scale = compressor, query_scale(head_dim)
        self._free = list(range(num_decisions - 1, 0, -1))
        # Least recently used first.
        self._decisions: OrderedDict[str, int] = OrderedDict()

    def decision_of(self, request_id: str) -> int:
        """Return the request's decision, 0 if nothing was decided for it."""
        decision = self._decisions.get(request_id)
        if decision is None:
            return 0
        self._decisions.move_to_end(request_id)
        return decision

    @torch.inference_mode()
    def decide(
        self, ends: Sequence[tuple[str, int]], hidden_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decide for requests whose last prompt token is in the batch.

        Args:
            ends: At least one: its id, and where in the batch that token is.
            hidden_TD: The target's states after its final norm.

        Returns:
            Their decisions, int64 ``[C]``, and what queries hold by them, ``[C, K]``.
        """
        taken = [self._take_decision(request_id) for request_id, _ in ends]
        both = [taken, [row for _, row in ends]]
        decision_C, row_C = async_tensor_h2d(both, hidden_TD.device, torch.int64)
        return decision_C, self._compressor.decide(hidden_TD[row_C]).bias_GK * self._scale

    def _take_decision(self, request_id: str) -> int:
        """The request's own, else a free one, else that of the request not seen for longest."""
        decision = self._decisions.pop(request_id, None)
        if decision is None:
            decision = self._free.pop() if self._free else self._decisions.popitem(last=False)[1]
        self._decisions[request_id] = decision
        return decision


class PromptLengths:
    """Prompt lengths by request id on the V2 runner, of the requests that were added last.

    That runner's batches say how many tokens a request was added with. After a preemption these are
    the prompt and what was answered so far, so the prompt's own length is noted here.

    Args:
        max_num_requests: Most requests alive at once.
    """

    def __init__(self, max_num_requests: int) -> None:
        self._max_known = PROMPTS_PER_REQUEST * max_num_requests
        self._known: dict[str, int] = {}

    def length_of(self, request_id: str) -> int:
        """Return the request's prompt length, 0 if it was never added (dummy batches)."""
        return self._known.get(request_id, 0)

    def note(self, request_id: str, length: int) -> None:
        """Remember a request; one that is added again counts as new."""
        self._known.pop(request_id, None)
        if len(self._known) >= self._max_known:
            del self._known[next(iter(self._known))]
        self._known[request_id] = length

    def follow(self, model_state: Any) -> None:
        """Note every request that is added to this object from now on."""
        patch(model_state, "add_request", self._add_request)

    def _add_request(self, original: Callable[..., Any], req_index: int, new_req_data: Any) -> Any:
        self.note(new_req_data.req_id, new_req_data.prompt_len)
        return original(req_index, new_req_data)

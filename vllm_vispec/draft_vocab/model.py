"""A smaller lm_head for the draft: the rows of the target's for tokens that are worth drafting.

A draft step reads its lm_head whole, for a large vocabulary most of its cost.  Here the rows are
copied once, after vLLM shared the target's lm_head and before graphs are captured; from then on
vLLM's own path for drafts with a vocabulary of their own does the rest (``LocalArgmaxMixin``):
argmax over the few logits, on each tensor-parallel rank over its share, then a look-up.

The target verifies with its whole lm_head, so what is answered does not change.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_vispec.draft_vocab.files import find_vocab, quantized_lm_head
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)


class DraftLogits:
    """Mixin of a draft model: logits over the target's vocabulary, whatever the draft's is.

    vLLM asks for logits where drafts are sampled with probabilities; for the argmax it calls
    ``get_top_tokens``, which needs no scattering.
    """

    config: Any

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return logits ``[T, V]``; -inf for tokens that are not drafted."""
        logits: torch.Tensor | None = super().compute_logits(hidden_states)  # type: ignore[misc]
        ids = getattr(self, "draft_token_ids", None)
        if ids is None or logits is None:
            return logits
        return scatter_logits(logits, ids, self.config.vocab_size)


def give_own_lm_head(model: Any, folder: Path) -> None:
    """Replace the target's lm_head in a loaded draft model, if its settings ask for that.

    Memory: N x hidden size in the target's dtype, shared among tensor-parallel ranks.

    Args:
        folder: The head's, on this machine.

    Raises:
        ViSpecError: the list cannot be used, or the target's lm_head is quantized.
    """
    vocab_size = model.config.vocab_size
    vocab = find_vocab(model.vispec_config.draft_vocab, folder, vocab_size)
    if vocab is None:
        return
    shared: VocabParallelEmbedding = model.lm_head
    _check_plain(shared, model.config.hidden_size)
    # Ascending, so that of equal logits the same token wins as among all of them.
    ids = torch.tensor(sorted(vocab.token_ids), device=shared.weight.device)
    del model.lm_head
    model.lm_head = _head_of(gather_rows(shared, ids))
    model.logits_processor.org_vocab_size = len(ids)
    model.register_buffer("draft_token_ids", ids, persistent=False)
    # The name and the meaning are those of vLLM's mixin: what to add to a draft id.
    offsets = ids - torch.arange(len(ids), device=ids.device)
    model.register_buffer("draft_id_to_target_id", offsets, persistent=False)
    logger.info("ViSpec drafts %d of %d tokens", len(ids), vocab_size)


def gather_rows(lm_head: VocabParallelEmbedding, ids: torch.Tensor) -> torch.Tensor:
    """Rows ``[N, D]`` of an lm_head that may be spread over ranks, on every rank."""
    first = lm_head.shard_indices.org_vocab_start_index
    count = lm_head.shard_indices.num_org_elements
    local = ids - first
    is_mine = (local >= 0) & (local < count)
    rows = lm_head.weight[local.clamp(0, max(count - 1, 0))].masked_fill(~is_mine[:, None], 0)
    return tensor_model_parallel_all_reduce(rows) if lm_head.tp_size > 1 else rows


def scatter_logits(logits: torch.Tensor, ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits ``[T, V]`` from those of the draft's tokens ``[T, N]``; the others are -inf."""
    whole = logits.new_full((logits.shape[0], vocab_size), float("-inf"))
    return whole.index_copy_(1, ids, logits)


def _head_of(rows: torch.Tensor) -> nn.Module:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    with rows.device:
        head = ParallelLMHead(*rows.shape, params_dtype=rows.dtype, prefix="draft_vocab.lm_head")
    head.weight_loader(head.weight, rows)
    head.quant_method.process_weights_after_loading(head)
    return head


def _check_plain(lm_head: Any, hidden_size: int) -> None:
    weight = getattr(lm_head, "weight", None)
    plain = (torch.float32, torch.bfloat16, torch.float16)
    is_plain = isinstance(weight, torch.Tensor) and weight.dtype in plain
    if weight is None or not is_plain or weight.shape[1:] != (hidden_size,):
        raise quantized_lm_head(type(lm_head.quant_method).__name__)

"""The table of what the draft's row ids stand for, and the rows of the batch.

Shapes: D hidden size, Q num_query_tokens, T tokens in the batch, R requests, A rows of the batch
that hold a compressor's token.
"""

import torch
from torch import nn

from vllm_vispec.spec_decode.step import DraftStep, PlacedTokens, RowIds

# Added to a masked key through the padded head channels; a power of two is exact in every dtype.
MASK_CHANNEL = 64.0


class RowTable(nn.Module):
    """Static buffers the draft reads; nothing else writes them.

    A draft row's layer input is ``keep * fc(embedding, hidden) + offset``. Text rows keep and add
    the constant that their image's global feature contributes. Compressed image tokens replace, and
    so do masked positions. A compressor's tokens share an id; their contents come with the step.

    Buffers that begin with ``batch_`` hold the batch's rows. They are gathered once a step, before
    the first pass, so that a pass only slices. Their addresses never change: compiled graphs and
    CUDA graphs hold them.

    Args:
        ids: Numbering of the table's entries.
        hidden_size: D.
        max_num_tokens: Longest batch, in tokens; the batch's buffers are about as large as vLLM's
            own buffer of hidden states.
    """

    def __init__(self, ids: RowIds, hidden_size: int, max_num_tokens: int) -> None:
        super().__init__()
        self.ids = ids
        self.row_ids: torch.Tensor
        self.offset: torch.Tensor
        self.keep: torch.Tensor
        self.key_mask: torch.Tensor
        self.batch_offset: torch.Tensor
        self.batch_keep: torch.Tensor
        self.batch_key_mask: torch.Tensor
        self.add_zeros("row_ids", max_num_tokens, dtype=torch.int32)
        for name, width in (("offset", hidden_size), ("keep", 1), ("key_mask", 1)):
            self.add_zeros(name, ids.size, width)
            self.add_zeros(f"batch_{name}", max_num_tokens, width)
        self.keep[: ids.masked : ids.num_query_tokens] = 1.0
        self.key_mask[ids.masked] = -MASK_CHANNEL

    def add_zeros(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> None:
        """Register a buffer that is no weight, of the default dtype."""
        zeros = torch.zeros(shape, dtype=dtype or torch.get_default_dtype())
        self.register_buffer(name, zeros, persistent=False)

    @torch.inference_mode()
    def write_image(
        self, slot: int, offset_D: torch.Tensor, token_QD: torch.Tensor | None = None
    ) -> None:
        """Write what an image contributes.

        Args:
            slot: The image's; 0 is text before the first image.
            offset_D: What its global feature adds to text rows.
            token_QD: Layer inputs of its ``Q - 1`` compressed tokens.
        """
        first = self.ids.text(slot)
        self.offset[first] = offset_D
        if token_QD is not None:
            self.offset[first + 1 : first + self.ids.num_query_tokens] = token_QD

    def set_step(self, step: DraftStep) -> None:
        """Take the rows of the tokens of the next first pass; nothing waits for the copies."""
        num_tokens = len(step.row_ids_T)
        row_id_T = self.row_ids[:num_tokens]
        row_id_T.copy_(step.row_ids_T, non_blocking=True)
        for table, batch in self._pairs():
            torch.index_select(table, 0, row_id_T, out=batch[:num_tokens])
        if step.image_tokens is not None:
            self._put_image_tokens(step.image_tokens)

    def _put_image_tokens(self, placed: PlacedTokens) -> None:
        index_A, token_A = placed.places_2A.to(self.offset.device, non_blocking=True)
        input_AD = placed.input_SD[token_A]
        self.batch_offset.index_copy_(0, index_A, input_AD.to(self.batch_offset.dtype))

    def select_rows(self, token_indices: torch.Tensor) -> None:
        """Let row ``i`` of the batch be what row ``token_indices[i]`` was."""
        for _, batch in self._pairs():
            batch[: token_indices.shape[0]] = batch[token_indices]

    def layer_input(self, fused_TD: torch.Tensor) -> torch.Tensor:
        """Return the layer input ``[T, D]`` given the fused text input of every row."""
        num_tokens = fused_TD.shape[0]
        keep_T1 = self.batch_keep[:num_tokens]
        return torch.addcmul(self.batch_offset[:num_tokens], fused_TD, keep_T1)

    def key_mask_of(self, num_tokens: int) -> torch.Tensor:
        """Return what the masking channels of keys hold, ``[T, 1]``: 0, or very low if masked."""
        return self.batch_key_mask[:num_tokens]

    def _pairs(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        return (
            (self.offset, self.batch_offset),
            (self.keep, self.batch_keep),
            (self.key_mask, self.batch_key_mask),
        )

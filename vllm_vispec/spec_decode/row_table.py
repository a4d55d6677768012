"""The table of what the draft's rows stand for, and the rows of the batch.

Shapes: D hidden size, Q num_query_tokens, T tokens in the batch, R requests, K branches, C choices.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm_vispec.spec_decode.layout import RowCodes

if TYPE_CHECKING:
    from vllm_vispec.spec_decode.adaptor import TextFusion

# Added to a hole's keys through the padded head channels; a power of two is exact in every dtype.
MASK_CHANNEL = 64.0
# What a branch's keys hold in the branch's own channel; as exact, and in reach of every dtype.
BRANCH_CHANNEL = 128.0


class RowTable(nn.Module):
    """Static buffers the draft reads: what each row code stands for, and the rows of the batch.

    A draft row's layer input is ``keep * fc(embedding, hidden) + offset``: text rows keep and add
    the constant their image's global feature contributes, compact tokens and holes replace. A
    compressor's tokens share a code and are put into the batch's rows image by image. The batch's
    rows are gathered once a round, before the first pass, so that a pass only slices.

    Args:
        codes: Numbering of the table's entries.
        hidden_size: D.
        max_num_tokens: Longest batch, in tokens; the batch's buffers are about as large as vLLM's
            own buffer of hidden states.
    """

    def __init__(self, codes: RowCodes, hidden_size: int, max_num_tokens: int) -> None:
        super().__init__()
        self.codes = codes
        self.row_codes: torch.Tensor
        self.offset: torch.Tensor
        self.keep: torch.Tensor
        self.key_mask: torch.Tensor
        self.batch_offset: torch.Tensor
        self.batch_keep: torch.Tensor
        self.batch_key_mask: torch.Tensor
        codes_T = torch.zeros(max_num_tokens, dtype=torch.int32)
        self.register_buffer("row_codes", codes_T, persistent=False)
        dtype = torch.get_default_dtype()
        for name, width in (("offset", hidden_size), ("keep", 1), ("key_mask", 1)):
            for prefix, height in (("", codes.size), ("batch_", max_num_tokens)):
                buffer = torch.zeros(height, width, dtype=dtype)
                self.register_buffer(prefix + name, buffer, persistent=False)
        self.keep[: codes.hole : codes.num_query_tokens] = 1.0
        self.key_mask[codes.hole] = -MASK_CHANNEL

    def set_batch(self, codes_T: torch.Tensor) -> None:
        """Take the codes, int32 ``[T]`` on the host, of the tokens of the next first pass."""
        num_tokens = codes_T.shape[0]
        code_T = self.row_codes[:num_tokens]
        code_T.copy_(codes_T, non_blocking=True)
        for table, batch in self._pairs():
            torch.index_select(table, 0, code_T, out=batch[:num_tokens])

    @torch.inference_mode()
    def set_no_image(self, fusion: "TextFusion") -> None:
        """Write slot 0: text before the first image sees a global feature of zeros (4.4)."""
        code = self.codes.text(0)
        self.offset[code] = fusion.offset(torch.zeros_like(self.offset[code]))

    def keep_rows(self, token_indices: torch.Tensor) -> None:
        """Keep one row for each request, given its index in the batch, for the draft steps."""
        for _, batch in self._pairs():
            batch[: token_indices.shape[0]] = batch[token_indices]

    def put_rows(self, index_A: torch.Tensor, offset_AD: torch.Tensor) -> None:
        """Give rows ``[A]`` of the batch contents that are in no table: tokens of an image."""
        self.batch_offset.index_copy_(0, index_A, offset_AD.to(self.batch_offset.dtype))

    def mix(self, fused_TD: torch.Tensor) -> torch.Tensor:
        """Return the layer input ``[T, D]`` given the fused text input of every row."""
        num_tokens = fused_TD.shape[0]
        keep_T1 = self.batch_keep[:num_tokens]
        return torch.addcmul(self.batch_offset[:num_tokens], fused_TD, keep_T1)

    def key_mask_of(self, num_tokens: int) -> torch.Tensor:
        """Return what the padded key channels hold, ``[T, 1]``: 0, or very low in a hole."""
        return self.batch_key_mask[:num_tokens]

    def _pairs(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        return (
            (self.offset, self.batch_offset),
            (self.keep, self.batch_keep),
            (self.key_mask, self.batch_key_mask),
        )


class GatedRowTable(RowTable):
    """The table of heads whose gate decides, request by request, which branches are seen.

    A token's key says by its code which branch it is of. How much a branch counts is the request's
    business, hence the query's: each row of the batch holds the biases of its request's choice.
    Choice 0 is that of requests nothing was decided for: all branches count as they are.

    Args:
        num_choices: Requests, choice 0 included, whose choices are kept.
        Others: As of `RowTable`.
    """

    def __init__(
        self, codes: RowCodes, hidden_size: int, max_num_tokens: int, num_choices: int
    ) -> None:
        super().__init__(codes, hidden_size, max_num_tokens)
        self.row_choices: torch.Tensor
        self.key_code: torch.Tensor
        self.query_code: torch.Tensor
        self.batch_key_code: torch.Tensor
        self.batch_query_code: torch.Tensor
        dtype = torch.get_default_dtype()
        for name, height in (
            ("key_code", codes.size),
            ("query_code", num_choices),
            ("batch_key_code", max_num_tokens),
            ("batch_query_code", max_num_tokens),
        ):
            buffer = torch.zeros(height, codes.num_branches, dtype=dtype)
            self.register_buffer(name, buffer, persistent=False)
        choices_T = torch.zeros(max_num_tokens, dtype=torch.int32)
        self.register_buffer("row_choices", choices_T, persistent=False)
        self.key_code[codes.token(0) :].fill_diagonal_(BRANCH_CHANNEL)

    def set_choices(self, choices_T: torch.Tensor) -> None:
        """Take the choices, int32 ``[T]`` on the host, of the tokens of the next first pass."""
        num_tokens = choices_T.shape[0]
        choice_T = self.row_choices[:num_tokens]
        choice_T.copy_(choices_T, non_blocking=True)
        out = self.batch_query_code[:num_tokens]
        torch.index_select(self.query_code, 0, choice_T, out=out)

    def decide(self, choices_C: torch.Tensor, code_CK: torch.Tensor) -> None:
        """Write what the queries of choices ``[C]`` hold in the branches' channels."""
        self.query_code.index_copy_(0, choices_C, code_CK.to(self.query_code.dtype))

    def keep_rows(self, token_indices: torch.Tensor) -> None:
        """See `RowTable.keep_rows`."""
        super().keep_rows(token_indices)
        batch = self.batch_query_code
        batch[: token_indices.shape[0]] = batch[token_indices]

    def branch_codes(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what queries and keys of a pass hold in the branches' channels, ``[T, K]`` each.

        Args:
            num_rows: T.
        """
        return self.batch_query_code[:num_rows], self.batch_key_code[:num_rows]

    def _pairs(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        return (*super()._pairs(), (self.key_code, self.batch_key_code))

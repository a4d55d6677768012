"""What a published model needs beside tokens: rotary positions and image features by row.

A row of the batch is a token at its own position, as in the target's pass. Models of one family
count rotary positions alike, so the draft's are the target's. They are kept as offsets to plain
positions: behind a request's images the offset stays the same, whatever is drafted.

Shapes: T tokens in the batch, R requests, A rotary axes, N image tokens, D the draft's hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.utils.torch_utils import PIN_MEMORY

from vllm_vispec.spec_decode.step import RequestRows
from vllm_vispec.utils.errors import ViSpecError

FEATURES = "vispec_draft_features"
"""Attribute of the target's image features: the draft's, of the same image. It lives as long."""


class DraftPositions(nn.Module):
    """Static buffers of M-RoPE offsets and positions; graphs hold their addresses."""

    offset_AT: torch.Tensor
    position_AT: torch.Tensor

    def __init__(self, num_axes: int, max_num_tokens: int) -> None:
        super().__init__()
        # One column more keeps slices apart from whole tensors, as vLLM's own M-RoPE buffers do.
        for name in ("offset_AT", "position_AT"):
            zeros = torch.zeros(num_axes, max_num_tokens + 1, dtype=torch.int64)
            self.register_buffer(name, zeros, persistent=False)

    def set_step(self, rotary_AT: torch.Tensor, position_T: torch.Tensor) -> None:
        """Take the target's rotary and plain positions of a batch."""
        torch.sub(rotary_AT, position_T, out=self.offset_AT[:, : position_T.shape[0]])

    def begin_steps(self, token_indices_R: torch.Tensor) -> None:
        """Let row ``i`` be the next token of request ``i``, whose last row was given.

        Text goes on behind the largest position of an image, which its last token has.
        """
        last_R = self.offset_AT[:, token_indices_R].amax(dim=0)
        self.offset_AT[:, : last_R.shape[0]] = last_R

    def forward(self, position_T: torch.Tensor) -> torch.Tensor:
        """Return rotary positions ``[A, T]``."""
        count = position_T.shape[0]
        out_AT = self.position_AT[:, :count]
        torch.add(self.offset_AT[:, :count], position_T, out=out_AT)
        return out_AT


class PublishedRows:
    """Stands where `spec_decode.draft_rows.DraftRows` stands for heads.

    Drafts with plain positions have no ``positions``.
    """

    gate = None

    def __init__(self, positions: DraftPositions | None) -> None:
        self._positions = positions
        self.features: tuple[list[torch.Tensor], torch.Tensor] | None = None
        """Features ``[N, D]`` of the batch's image rows, and where they are, bool ``[T]`` on the
        host; None: no row is an image's."""

    def serves_step(self, request_ids: list[str], first_rows: list[int], num_rows: int) -> bool:
        """Return False: every step is laid out."""
        return False

    def set_step(
        self,
        requests: Sequence[RequestRows],
        outputs: Mapping[str, torch.Tensor],
        hidden_states: torch.Tensor | None = None,
    ) -> None:
        """Find the features of the batch's image rows, its requests given in order.

        They hang on the target's ``outputs``, which are kept by item hash.

        Raises:
            ViSpecError: An image's features are not there.
        """
        parts_ND: list[torch.Tensor] = []
        num_rows = sum(request.num_rows for request in requests)
        is_image_T = torch.zeros(num_rows, dtype=torch.bool, pin_memory=PIN_MEMORY)
        begin = 0
        for request in requests:
            for first, features_ND in _image_rows(request, outputs):
                row = begin + first - request.first_row
                is_image_T[row : row + features_ND.shape[0]] = True
                parts_ND.append(features_ND)
            begin += request.num_rows
        self.features = (parts_ND, is_image_T) if parts_ND else None

    def begin_steps(self, token_indices: torch.Tensor) -> None:
        """Let row ``i`` be the next token of request ``i``, whose last row was given."""
        if self._positions is not None:
            self._positions.begin_steps(token_indices)

    def select_rows(self, index: torch.Tensor) -> None:
        """Let row ``i`` be of the request of row ``index[i]``, behind `begin_steps`."""
        self.begin_steps(index)

    def reset_encoder_cache(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call vLLM's method: the draft's features go with the target's."""
        return original(*args, **kwargs)


def _image_rows(
    request: RequestRows, outputs: Mapping[str, torch.Tensor]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield stretches of image tokens among a request's rows: where they begin, their features."""
    begin, end = request.first_row, request.first_row + request.num_rows
    for feature in request.features:
        place: Any = feature.mm_position
        if place.offset >= end or place.offset + place.length <= begin:
            continue
        taken = 0
        for first, last in place.extract_embeds_range():
            low, high = max(first, begin), min(last + 1, end)
            if low < high:
                of_image_ND = _features_of(feature.identifier, outputs)
                yield low, of_image_ND[taken + low - first : taken + high - first]
            taken += last + 1 - first


def _features_of(identifier: str, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    features: torch.Tensor | None = getattr(outputs.get(identifier), FEATURES, None)
    if features is None:
        raise ViSpecError(
            f"the draft has no features of item {identifier}: the target's came from elsewhere "
            "than its vision tower (embeddings in the prompt, a cache connector); draft with a "
            "head, or serve this target without speculation"
        )
    return features

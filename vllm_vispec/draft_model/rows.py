"""What a published model needs beside tokens: rotary positions and image features by row.

A row of the batch is a token at its own position, as in the target's pass. Models of one family
count rotary positions alike, so the draft's are the target's. They are kept as offsets to plain
positions: behind a request's images the offset stays the same, whatever is drafted.

Shapes: T tokens in the batch, R requests, A rotary axes, N image tokens, D the draft's hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from operator import le
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from vllm.utils.torch_utils import PIN_MEMORY, np_to_pinned_tensor

from vllm_vispec.compressors.places import num_tokens, wanted_rows
from vllm_vispec.compressors.spec import CompressorSpec
from vllm_vispec.draft_model.masking import MaskBuffers
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
        self._num_axes = num_axes
        # One column more keeps slices apart from whole tensors, as vLLM's own M-RoPE buffers do.
        for name in ("offset_AT", "position_AT"):
            zeros = torch.zeros(num_axes, max_num_tokens + 1, dtype=torch.int64)
            self.register_buffer(name, zeros, persistent=False)

    def set_step(self, rotary_AT: torch.Tensor, position_T: torch.Tensor) -> None:
        """Take the target's rotary and plain positions of a batch."""
        torch.sub(rotary_AT, position_T, out=self.offset_AT[:, : position_T.shape[0]])

    def hide_images(self, offset_T: np.ndarray) -> None:
        """Take a batch's offsets of text that does not count images."""
        pinned = np_to_pinned_tensor(offset_T)
        device_T = pinned.to(self.offset_AT.device, non_blocking=True)
        self.offset_AT[:, : device_T.shape[0]] = device_T

    def begin_steps(self, token_indices_R: torch.Tensor) -> None:
        """Let row ``i`` be the next token of request ``i``, whose last row was given.

        Text goes on behind the largest position of an image, which its last token has.
        """
        last_R = self.offset_AT[:, token_indices_R].amax(dim=0)
        self.offset_AT[:, : last_R.shape[0]] = last_R

    def forward(self, position_T: torch.Tensor) -> torch.Tensor:
        """Return rotary positions ``[A, T]``, without A if the draft's are plain."""
        count = position_T.shape[0]
        out_AT = self.position_AT[:, :count]
        torch.add(self.offset_AT[:, :count], position_T, out=out_AT)
        # Rows of rejected tokens and those that pad a batch are read by none, but a rotary table
        # is: on V2 they have the plain positions of other rows, and a kernel for plain positions
        # would read in front of it.
        out_AT.clamp_(min=0)
        return out_AT if self._num_axes > 1 else out_AT[0]


class PublishedRows:
    """Stands where `spec_decode.draft_rows.DraftRows` stands for heads.

    Args:
        positions: None: the draft's are plain, and images count.
        masks: Hide rows of images; None: none is hidden.
        share: Which rows are seen; None: all.
    """

    gate = None

    def __init__(
        self,
        positions: DraftPositions | None,
        masks: MaskBuffers | None = None,
        share: CompressorSpec | None = None,
    ) -> None:
        self._positions, self._masks, self._share = positions, masks, share
        self._counts_images = share is None or num_tokens(share, 1) > 0
        # Requests of the last batch, where the images of each end, and its rows.
        self._past_images: tuple[list[str], list[int], int] = [], [], 0
        self.features: tuple[list[torch.Tensor], torch.Tensor] | None = None
        """Features ``[N, D]`` of the batch's image rows that are seen, and where they are, bool
        ``[T]`` on the host; None: there are none."""

    def serves_step(self, request_ids: list[str], first_rows: list[int], num_rows: int) -> bool:
        """Whether the last batch, which had no image's row, serves this one.

        It does where the same requests are further on with as many rows, as in decoding, and text
        is where the target has it.
        """
        last_ids, ends, last_num_rows = self._past_images
        return (
            self._counts_images
            and (last_ids, last_num_rows) == (request_ids, num_rows)
            and all(map(le, ends, first_rows))
        )

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
        is_seen_T = torch.zeros(num_rows, dtype=torch.bool, pin_memory=PIN_MEMORY)
        is_hidden_T = torch.zeros_like(is_seen_T)
        begin = 0
        for request in requests:
            for part in _image_parts(request):
                row = begin + part.low - request.first_row
                seen_N = seen_rows(self._share, part.size)
                low, high = np.searchsorted(seen_N, (part.start, part.start + part.length))
                is_hidden_T[row : row + part.length] = True
                if low < high:
                    is_seen_T[row + seen_N[low:high] - part.start] = True
                    parts_ND.append(_features_of(part.name, outputs)[low:high])
            begin += request.num_rows
        self.features = (parts_ND, is_seen_T) if parts_ND else None
        self._past_images = [], [], 0
        if not is_hidden_T.any():
            ids = [request.request_id for request in requests]
            self._past_images = ids, [_images_end(request) for request in requests], num_rows
        if self._masks is not None:
            self._masks.write_masks(is_hidden_T & ~is_seen_T)
        if not self._counts_images and self._positions is not None:
            self._positions.hide_images(_uncounted(requests, is_hidden_T))

    def begin_steps(self, token_indices: torch.Tensor) -> None:
        """Let row ``i`` be the next token of request ``i``, whose last row was given."""
        if self._masks is not None:
            self._masks.clear_masks()
        if self._positions is not None:
            self._positions.begin_steps(token_indices)

    def select_rows(self, index: torch.Tensor) -> None:
        """Let row ``i`` be of the request of row ``index[i]``, behind `begin_steps`."""
        self.begin_steps(index)

    def reset_encoder_cache(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call vLLM's method: the draft's features go with the target's."""
        return original(*args, **kwargs)


def _images_end(request: RequestRows) -> int:
    places: list[Any] = [feature.mm_position for feature in request.features]
    return max((place.offset + place.length for place in places), default=0)


@lru_cache(maxsize=1024)
def seen_rows(share: CompressorSpec | None, size: int) -> np.ndarray:
    """Return which rows of an image of ``size`` are seen, int64, ascending; see `compressors`."""
    return np.arange(size) if share is None else wanted_rows(share, size)


class _ImagePart(NamedTuple):
    """A stretch of image tokens among a request's rows.

    Attributes:
        name: The item's identifier.
        size: Image tokens of the whole item.
        low: Absolute position of the first of these.
        start: Which of the item's tokens that is.
        length: How many there are.
    """

    name: str
    size: int
    low: int
    start: int
    length: int


def _image_parts(request: RequestRows) -> Iterator[_ImagePart]:
    begin, end = request.first_row, request.first_row + request.num_rows
    for feature in request.features:
        place: Any = feature.mm_position
        if place.offset >= end or place.offset + place.length <= begin:
            continue
        size, taken = place.get_num_embeds(), 0
        for first, last in place.extract_embeds_range():
            low, high = max(first, begin), min(last + 1, end)
            if low < high:
                yield _ImagePart(feature.identifier, size, low, taken + low - first, high - low)
            taken += last + 1 - first


def _uncounted(requests: Sequence[RequestRows], is_hidden_T: torch.Tensor) -> np.ndarray:
    """Return the offsets ``[T]`` of rows whose positions do not count images."""
    hidden_T, offset_T = is_hidden_T.numpy(), np.empty(len(is_hidden_T), dtype=np.int64)
    begin = 0
    for request in requests:
        end = begin + request.num_rows
        unseen = 0
        for feature in request.features:
            place: Any = feature.mm_position
            num_rows = min(request.first_row - place.offset, place.length)
            if num_rows > 0:
                unseen += place.get_embeds_indices_in_range(0, num_rows)[1]
        offset_T[begin:end] = -(unseen + np.cumsum(hidden_T[begin:end]))
        begin = end
    return offset_T


def _features_of(identifier: str, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    features: torch.Tensor | None = getattr(outputs.get(identifier), FEATURES, None)
    if features is None:
        raise ViSpecError(
            f"the draft has no features of item {identifier}: the target's came from elsewhere "
            "than its vision tower (embeddings in the prompt, a cache connector); draft with a "
            "head, or serve this target without speculation"
        )
    return features

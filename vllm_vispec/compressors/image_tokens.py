"""A compressor in the engine: its tokens, and the rows of the batch in which they stand.

Tokens are needed only in the steps in which an image's rows are in the batch, and then the vision
tower's output is at hand. Later the tokens are keys in the draft's cache. An image that is split by
chunks is compressed once, as long as its tokens stay remembered.

Tensor names end in their shape: N embeddings of one image, M its tokens, D hidden size, A rows of
the batch that hold a token, S tokens of all images of a step.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import np_to_pinned_tensor

from vllm_vispec.compressors.compressor import ImageCompressor
from vllm_vispec.compressors.places import ImagePlaces, place_tokens
from vllm_vispec.spec_decode.adaptor import TextFusion
from vllm_vispec.spec_decode.layout import FeatureSlice, ImageRun, RequestLayout
from vllm_vispec.spec_decode.step import PlacedTokens, RowIds


class TokensOfImage(NamedTuple):
    """Rows of the batch, the tokens that stand there, and all tokens of their image."""

    rows_A: np.ndarray
    tokens_A: np.ndarray
    inputs_MD: torch.Tensor


def join_images(images: Sequence[TokensOfImage]) -> PlacedTokens | None:
    """Return a step's tokens, those of all images at once; None without any."""
    if not images:
        return None
    starts = np.cumsum([0, *(len(image.inputs_MD) for image in images[:-1])])
    rows_A = np.concatenate([image.rows_A for image in images])
    shifted = [image.tokens_A + start for image, start in zip(images, starts, strict=True)]
    places_2A = np.stack((rows_A, np.concatenate(shifted)))
    input_SD = torch.cat([image.inputs_MD for image in images])
    return PlacedTokens(np_to_pinned_tensor(places_2A), input_SD)


class ImageTokens:
    """Compresses images, and says where their tokens stand.

    Args:
        compressor: The head's.
        fusion: Turns a token into the layer's input.
        ids: Numbering of the row table.
        max_tokens: Tokens that are remembered.
    """

    def __init__(
        self, compressor: ImageCompressor, fusion: TextFusion, ids: RowIds, max_tokens: int
    ) -> None:
        self._compressor, self._fusion, self._ids = compressor, fusion, ids
        self._max_tokens, self._num_tokens = max_tokens, 0
        self._known: OrderedDict[FeatureSlice, torch.Tensor] = OrderedDict()

    def clear(self) -> None:
        """Forget every image, e.g. because the vision tower's weights changed."""
        self._known.clear()
        self._num_tokens = 0

    def place(
        self,
        layout: RequestLayout,
        first_row: int,
        begin: int,
        embeddings: Mapping[str, torch.Tensor],
        out: np.ndarray,
    ) -> tuple[list[TokensOfImage], list[ImageRun]]:
        """Write the ids of a request's tokens over those of masked positions.

        Args:
            layout: The request's vision runs.
            first_row: Absolute position of the request's first row in the batch.
            begin: Index of that row in the batch.
            embeddings: Vision-tower output by item hash, ``[N, >= D]`` each.
            out: int32, the ids of the request's rows.

        Returns:
            The tokens with their rows, and the runs that have to do without, since their embeddings
            are not at hand.
        """
        placed, missing = [], []
        for run in layout.runs_within(first_row, first_row + len(out)):
            for part, part_row in run.part_rows:
                places = place_tokens(self._compressor.spec, part.stop - part.start)
                index = places.rows + (part_row - first_row)
                inside = (index >= 0) & (index < len(out))
                if not inside.any():
                    continue
                inputs_MD = self._inputs(part, embeddings)
                if inputs_MD is None:
                    missing.append(run)
                    continue
                index = index[inside]
                out[index] = self._row_ids(places)[inside]
                placed.append(TokensOfImage(index + begin, places.tokens[inside], inputs_MD))
        return placed, missing

    def _row_ids(self, places: ImagePlaces) -> np.ndarray:
        """Ids of an image's rows with tokens; without a gate branches are not told apart."""
        first = self._ids.branch(0)
        if self._compressor.spec.gated:
            return first + places.branches
        return np.full_like(places.rows, first)

    @torch.inference_mode()
    def _inputs(
        self, part: FeatureSlice, embeddings: Mapping[str, torch.Tensor]
    ) -> torch.Tensor | None:
        """The layer's input ``[M, D]`` for all tokens of an image; None without its embeddings."""
        known = self._known.get(part)
        if known is not None:
            self._known.move_to_end(part)
            return known
        output = embeddings.get(part.identifier)
        if output is None:
            return None
        size = self._fusion.weight.shape[0]
        image_ND = output[part.start : part.stop, :size].to(self._fusion.weight.dtype)
        (token_MD,) = self._compressor([image_ND])
        is_input = self._compressor.spec.makes_layer_inputs
        inputs_MD = token_MD if is_input else self._fusion.token_input(token_MD)
        self._remember(part, inputs_MD)
        return inputs_MD

    def _remember(self, part: FeatureSlice, inputs_MD: torch.Tensor) -> None:
        self._known[part] = inputs_MD
        self._num_tokens += len(inputs_MD)
        while self._num_tokens > self._max_tokens and len(self._known) > 1:
            _, oldest = self._known.popitem(last=False)
            self._num_tokens -= len(oldest)

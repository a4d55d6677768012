"""Tokens that a compressor makes of images, put into the rows of the batch.

Needed only in the steps in which an image's rows are in the batch, and then the vision tower's
output is at hand: behind that the tokens are keys in the draft's cache. An image that is split by
chunks is compressed once, as long as its tokens stay remembered.

Tensor names end in their shape: N embeddings of one image, M its tokens, D hidden size, S the
tokens of all images of a step, A rows of the batch that hold one.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_vispec.compressors.compressor import ImageCompressor
from vllm_vispec.compressors.places import ImagePlaces, place_tokens
from vllm_vispec.spec_decode.adaptor import TextFusion
from vllm_vispec.spec_decode.layout import FeatureSlice, ImageRun, RequestLayout
from vllm_vispec.spec_decode.row_table import RowTable

if TYPE_CHECKING:
    from vllm_vispec.models.vispec import DraftModel


class _Placed(NamedTuple):
    """Rows of the batch, the tokens that stand there, and all tokens of their image ``[M, D]``."""

    rows_A: np.ndarray
    tokens_A: np.ndarray
    inputs_MD: torch.Tensor


class ImageTokens:
    """Compresses images and writes their tokens where they stand.

    Args:
        compressor: The head's.
        fusion: Turns a token into the layer's input.
        rows: The draft's row table.
        max_tokens: Tokens that are remembered.
    """

    def __init__(
        self, compressor: ImageCompressor, fusion: TextFusion, rows: RowTable, max_tokens: int
    ) -> None:
        self._compressor, self._fusion, self._rows = compressor, fusion, rows
        self._max_tokens, self._num_tokens = max_tokens, 0
        self._known: OrderedDict[FeatureSlice, torch.Tensor] = OrderedDict()
        self._placed: list[_Placed] = []

    @classmethod
    def of(cls, model: "DraftModel") -> "ImageTokens | None":
        """For a draft; None if it has no compressor."""
        if model.compressor is None:
            return None
        rows = model.rows
        return cls(model.compressor, model.fusion, rows, rows.row_codes.shape[0])

    def clear(self) -> None:
        """Forget every image, e.g. because the vision tower's weights changed."""
        self._known.clear()
        self._num_tokens = 0

    def write_codes(
        self,
        layout: RequestLayout,
        first_row: int,
        begin: int,
        embeddings: Mapping[str, torch.Tensor],
        out: np.ndarray,
    ) -> list[ImageRun]:
        """Write the codes of tokens over those of holes, and note what `put_rows` has to put there.

        Args:
            layout: The request's vision runs.
            first_row: Absolute position of the request's first row in the batch.
            begin: Index of that row in the batch.
            embeddings: Vision-tower output by item hash, ``[N, >= D]`` each.
            out: int32, the codes of the request's rows.

        Returns:
            The runs that have to do without tokens, since their embeddings are not at hand.
        """
        missing = []
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
                out[index] = self._codes(places)[inside]
                self._placed.append(_Placed(index + begin, places.tokens[inside], inputs_MD))
        return missing

    def put_rows(self) -> None:
        """Put the noted tokens into the rows of the batch, once its codes are set."""
        if not self._placed:
            return
        starts = np.cumsum([0, *(len(placed.inputs_MD) for placed in self._placed)])
        rows_A = np.concatenate([placed.rows_A for placed in self._placed])
        tokens_A = np.concatenate(
            [p.tokens_A + start for p, start in zip(self._placed, starts, strict=False)]
        )
        inputs_SD = torch.cat([placed.inputs_MD for placed in self._placed])
        both_2A = np.stack((rows_A, tokens_A))
        index_A, token_A = async_tensor_h2d(both_2A, inputs_SD.device)
        self._rows.put_rows(index_A, inputs_SD[token_A])
        self._placed.clear()

    def _codes(self, places: ImagePlaces) -> np.ndarray:
        """Codes of an image's rows with tokens; without a gate branches are not told apart."""
        first = self._rows.codes.token(0)
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
        inputs_MD = self._fusion.token_input(token_MD)
        self._remember(part, inputs_MD)
        return inputs_MD

    def _remember(self, part: FeatureSlice, inputs_MD: torch.Tensor) -> None:
        self._known[part] = inputs_MD
        self._num_tokens += len(inputs_MD)
        while self._num_tokens > self._max_tokens and len(self._known) > 1:
            _, oldest = self._known.popitem(last=False)
            self._num_tokens -= len(oldest)

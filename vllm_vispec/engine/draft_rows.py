"""Keeps the draft's row codes in step with the batch; shared by both proposers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_vispec.engine.adaptor import RowTable
from vllm_vispec.engine.image_table import ImageTable
from vllm_vispec.engine.layout import (
    FeatureLike,
    ImageRun,
    RequestLayout,
    build_layout,
    write_row_codes,
)
from vllm_vispec.engine.model import EagleViSpecForCausalLM


@dataclass(frozen=True)
class RequestRows:
    """One request's part of the batch.

    Attributes:
        request_id: vLLM's id.
        features: Its multimodal items, empty for text-only requests.
        first_row: Absolute position of its first token in the batch.  For a request past its
            prompt any position past the prompt will do.
        num_rows: Its tokens in the batch.
    """

    request_id: str
    features: Sequence[FeatureLike]
    first_row: int
    num_rows: int


class DraftRows:
    """Writes, once per step, which table row every token of the batch uses.

    Host work is O(requests) plus one numpy fill of the batch; one asynchronous copy to the
    device, nothing is read back.

    Args:
        model: The draft.
        max_num_requests: Most requests alive at once; bounds the cache of layouts.
    """

    def __init__(self, model: EagleViSpecForCausalLM, max_num_requests: int) -> None:
        self._rows: RowTable = model.model.rows
        self.table = ImageTable(model.model.adaptor, self._rows.codes.num_slots)
        self._layouts: dict[str, tuple[Sequence[FeatureLike], RequestLayout]] = {}
        self._max_layouts = 4 * max_num_requests
        self._warned: set[tuple[str, ImageRun]] = set()

    def clear(self) -> None:
        """Forget all images, e.g. after new weights."""
        self.table.clear()

    def fill(self, requests: Sequence[RequestRows], embeddings: Mapping[str, torch.Tensor]) -> None:
        """Set the codes of a batch, requests in batch order.

        Args:
            requests: All requests of the batch.
            embeddings: Vision-tower output by item hash, whatever is at hand in this step.
        """
        total = sum(request.num_rows for request in requests)
        codes_T = np.zeros(total, dtype=np.int32)
        self.table.begin_step()
        begin = 0
        for request in requests:
            end = begin + request.num_rows
            if request.features:
                self._fill_request(request, embeddings, codes_T[begin:end])
            begin = end
        self._upload(codes_T)

    def gather(self, token_indices: torch.Tensor) -> None:
        """Keep only the codes of the given tokens, one per request, for the draft steps."""
        codes = self._rows.row_codes
        codes[: token_indices.shape[0]] = codes[token_indices]

    def _fill_request(
        self,
        request: RequestRows,
        embeddings: Mapping[str, torch.Tensor],
        out: np.ndarray,
    ) -> None:
        layout = self._layout(request)
        stop_row = request.first_row + request.num_rows

        def slot_of(run: ImageRun) -> int | None:
            slot = self.table.slot_of(run, embeddings)
            # A run that ends later is looked up again; its first rows are holes either way.
            if slot is None and run.text_row < stop_row:
                self._note_miss(request.request_id, run)
            return slot

        write_row_codes(layout, self._rows.codes, slot_of, request.first_row, out)

    def _note_miss(self, request_id: str, run: ImageRun) -> None:
        """Count a missing image once per request, not once per step."""
        if (request_id, run) not in self._warned:
            if len(self._warned) > self._max_layouts:
                self._warned.clear()
            self._warned.add((request_id, run))
            self.table.count_miss(run)

    def _layout(self, request: RequestRows) -> RequestLayout:
        known = self._layouts.get(request.request_id)
        # Ids may be reused; the features tell whether it is still the same request.
        if known is not None and known[0] is request.features:
            return known[1]
        if len(self._layouts) >= self._max_layouts:
            self._layouts.clear()
        layout = build_layout(request.features)
        self._layouts[request.request_id] = (request.features, layout)
        return layout

    def _upload(self, codes_T: np.ndarray) -> None:
        host = torch.from_numpy(codes_T)
        target = self._rows.row_codes[: host.shape[0]]
        if target.is_cuda:
            # The caching host allocator keeps the block until this copy has run.
            host = host.pin_memory()
        target.copy_(host, non_blocking=True)

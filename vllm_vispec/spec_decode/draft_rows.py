"""Makes each step's `DraftStep` from the batch's requests; the same for both model runners.

Features have their hooks here: a compressor places its tokens (`compressors.image_tokens`), and a
gate decides where prompts end (`compressors.gated`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import le
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import np_to_pinned_tensor

from vllm_vispec.compressors.gated import GateDecisions, GatedRowTable
from vllm_vispec.compressors.image_tokens import ImageTokens, TokensOfImage, join_images
from vllm_vispec.models.vispec import EagleViSpecForCausalLM
from vllm_vispec.spec_decode.connectors import receiving_connector
from vllm_vispec.spec_decode.image_table import ImageTable
from vllm_vispec.spec_decode.layout import FeatureLike, ImageRun, RequestLayout, build_layout
from vllm_vispec.spec_decode.row_table import RowTable
from vllm_vispec.spec_decode.step import (
    DraftStep,
    RequestRows,
    write_row_ids,
    write_text_row_ids,
)

_NO_IMAGES = RequestLayout()


@dataclass(frozen=True)
class _UniformStep:
    """A step whose rows all have one id, and keep it as long as its requests go on.

    Plain lists: numpy's calls are dear in a decoding step, whose caches are cold.
    """

    request_ids: list[str]
    first_rows: list[int]
    num_rows: int
    # Images in the table until then: one computed later may have taken the slot.
    num_computed: int


class DraftRows:
    """Tells the row table, once a step, which row every token of the batch uses.

    Host work is O(requests) plus one numpy fill of the batch; at most one asynchronous copy to the
    device, nothing is read back.

    Args:
        model: The draft.
        max_num_requests: Most requests alive at once; bounds the cache of layouts.
        kv_transfer: vLLM's ``KVTransferConfig``; None without a KV connector.
    """

    def __init__(
        self, model: EagleViSpecForCausalLM, max_num_requests: int, kv_transfer: Any = None
    ) -> None:
        draft = model.model
        head, rows = draft.head, draft.rows
        self._rows: RowTable = rows
        self._write_ids = write_row_ids if head.compress else write_text_row_ids
        # Without compression and global feature no row depends on an image.
        self._has_layouts = head.compress or head.global_feature
        self._has_slots = head.has_adaptor
        connector = receiving_connector(kv_transfer)
        self.table = ImageTable(rows, draft.fusion, draft.adaptor, connector)
        self._tokens: ImageTokens | None = None
        if draft.compressor is not None:
            max_tokens = rows.row_ids.shape[0]
            self._tokens = ImageTokens(draft.compressor, draft.fusion, rows.ids, max_tokens)
        self.gate: GateDecisions | None = None
        if draft.compressor is not None and isinstance(rows, GatedRowTable):
            self.gate = GateDecisions(draft.compressor, rows.num_decisions, head.head_dim)
        self._layouts: dict[str, tuple[Sequence[FeatureLike], RequestLayout]] = {}
        self._max_layouts = 4 * max_num_requests
        self._warned: set[tuple[str, ImageRun]] = set()
        self._uniform: _UniformStep | None = None

    def clear(self) -> None:
        """Forget all images, e.g. after new weights."""
        self.table.clear()
        if self._tokens is not None:
            self._tokens.clear()
        self._uniform = None

    def reset_encoder_cache(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands for vLLM's method of this name, which is called when weights are replaced.

        What was computed from the old vision tower must go with the encoder cache.
        """
        self.clear()
        return original(*args, **kwargs)

    def serves_step(self, request_ids: list[str], first_rows: list[int], num_rows: int) -> bool:
        """Whether the last batch's rows serve this one, so that it needs no `set_step`.

        They do in most decoding steps of one request, or of several without images: the same
        requests are further on, with as many rows, and no image was computed since. They never do
        where a gate decides, as any step may hold a prompt's end.

        Args:
            request_ids: The batch's requests, in its order.
            first_rows: See `RequestRows`.
            num_rows: Rows of the whole batch.
        """
        last = self._uniform
        return (
            last is not None
            and last.num_rows == num_rows
            and last.request_ids == request_ids
            # A preempted request begins anew.
            and all(map(le, last.first_rows, first_rows))
            and last.num_computed == self.table.stats.computed
        )

    def set_step(
        self,
        requests: Sequence[RequestRows],
        embeddings: Mapping[str, torch.Tensor],
        hidden_states: torch.Tensor | None = None,
    ) -> None:
        """Lay out a batch and hand it to the row table.

        Args:
            requests: All requests of the batch, in its order.
            embeddings: Vision-tower output by item hash, whatever is at hand in this step.
            hidden_states: The target's, ``[T, D]``; read only where a gate decides.
        """
        self.table.begin_step()
        decisions_T = self._decide(requests, hidden_states)
        row_ids_T = np.empty(sum(request.num_rows for request in requests), dtype=np.int32)
        placed: list[TokensOfImage] = []
        # The ids of requests that are behind their images and keep theirs; None for the others.
        lasting_ids: set[int | None] = set()
        begin = 0
        for request in requests:
            end, layout = begin + request.num_rows, self._layout(request)
            out = row_ids_T[begin:end]
            if request.first_row < layout.stop_row:
                placed += self._write_request(request, layout, embeddings, begin, out)
                lasting_ids.add(None)
            else:
                # So are most requests of a batch, hence a way of their own.
                row_id = self._text_id(request, layout, embeddings)
                out[:] = row_id
                lasting_ids.add(row_id)
            begin = end
        row_ids = np_to_pinned_tensor(row_ids_T)
        self._rows.set_step(DraftStep(row_ids, join_images(placed), decisions_T))
        self._uniform = None
        if len(lasting_ids) == 1 and None not in lasting_ids and self.gate is None:
            self._uniform = _UniformStep(
                [request.request_id for request in requests],
                [request.first_row for request in requests],
                begin,
                self.table.stats.computed,
            )

    def begin_steps(self, token_indices: torch.Tensor) -> None:
        """Before the draft steps, let row ``i`` be request ``i``'s, whose last row was given.

        Drafts are text; what follows the last row of an unfinished prompt is thrown away.
        """
        self.select_rows(token_indices)

    def select_rows(self, token_indices: torch.Tensor) -> None:
        """Let row ``i`` of the batch be what row ``token_indices[i]`` was."""
        # Rows of one id serve as they are, unless more of them are needed (draft trees).
        if self._uniform is None or token_indices.shape[0] > self._uniform.num_rows:
            self._rows.select_rows(token_indices)

    def _decide(
        self, requests: Sequence[RequestRows], hidden_states: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Let the gate decide where prompts end; return every row's decision, int32 ``[T]``."""
        if self.gate is None:
            return None
        ends: list[tuple[str, int]] = []
        begin = 0
        for request in requests:
            end = request.prompt_end
            if end is not None and self._layout(request).runs:
                ends.append((request.request_id, begin + end))
            begin += request.num_rows
        if ends and hidden_states is not None:
            assert isinstance(self._rows, GatedRowTable)
            self._rows.write_decisions(*self.gate.decide(ends, hidden_states))
        found = [self.gate.decision_of(request.request_id) for request in requests]
        num_rows = [request.num_rows for request in requests]
        return np_to_pinned_tensor(np.repeat(np.array(found, dtype=np.int32), num_rows))

    def _text_id(
        self, request: RequestRows, layout: RequestLayout, embeddings: Mapping[str, torch.Tensor]
    ) -> int:
        """Return the id of all rows of a request behind its images."""
        if not layout.runs:
            return self._rows.ids.text(0)
        return self._rows.ids.text(self._slot_of(request, layout.runs[-1], embeddings) or 0)

    def _slot_of(
        self, request: RequestRows, run: ImageRun, embeddings: Mapping[str, torch.Tensor]
    ) -> int | None:
        if not self._has_slots:
            return None
        slot = self.table.slot_of(run, embeddings)
        # A run that ends later is looked up again; its first rows are masked either way.
        if slot is None and run.text_row < request.first_row + request.num_rows:
            self._note_miss(request.request_id, run)
        return slot

    def _write_request(
        self,
        request: RequestRows,
        layout: RequestLayout,
        embeddings: Mapping[str, torch.Tensor],
        begin: int,
        out: np.ndarray,
    ) -> list[TokensOfImage]:
        """Write the ids of a request's rows, which begin at row ``begin`` of the batch."""

        def slot_of(run: ImageRun) -> int | None:
            return self._slot_of(request, run, embeddings)

        self._write_ids(layout, self._rows.ids, slot_of, request.first_row, out)
        if self._tokens is None:
            return []
        placed, missing = self._tokens.place(layout, request.first_row, begin, embeddings, out)
        for run in missing:
            self._note_miss(request.request_id, run)
        return placed

    def _note_miss(self, request_id: str, run: ImageRun) -> None:
        """Count a missing image once per request, not once per step."""
        if (request_id, run) not in self._warned:
            if len(self._warned) > self._max_layouts:
                self._warned.clear()
            self._warned.add((request_id, run))
            self.table.count_miss(run)

    def _layout(self, request: RequestRows) -> RequestLayout:
        if not request.features or not self._has_layouts:
            return _NO_IMAGES
        known = self._layouts.get(request.request_id)
        # Ids may be reused; the features tell whether it is still the same request.
        if known is not None and known[0] is request.features:
            return known[1]
        if len(self._layouts) >= self._max_layouts:
            self._layouts.clear()
        layout = build_layout(request.features)
        self._layouts[request.request_id] = (request.features, layout)
        return layout

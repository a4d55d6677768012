"""Keeps the draft's row codes in step with the batch; shared by both proposers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import np_to_pinned_tensor

from vllm_vispec.compressors.decisions import Choices
from vllm_vispec.compressors.image_tokens import ImageTokens
from vllm_vispec.models.vispec import EagleViSpecForCausalLM
from vllm_vispec.spec_decode.connectors import receiving_connector
from vllm_vispec.spec_decode.held_rows import HeldRows, Round
from vllm_vispec.spec_decode.image_table import ImageTable
from vllm_vispec.spec_decode.layout import FeatureLike, ImageRun, RequestLayout, row_rules
from vllm_vispec.spec_decode.row_table import GatedRowTable, RowTable


class RequestRows(NamedTuple):
    """One request's part of the batch.

    Attributes:
        request_id: vLLM's id.
        features: Its multimodal items, empty for text-only requests.
        first_row: Absolute position of its first token in the batch.  For a request past its
            prompt any position past the prompt will do.
        num_rows: Its tokens in the batch.
        num_prompt_tokens: Length of its prompt, 0 if not known.
    """

    request_id: str
    features: Sequence[FeatureLike]
    first_row: int
    num_rows: int
    num_prompt_tokens: int = 0

    @property
    def prompt_end(self) -> int | None:
        """Index among its rows of its last prompt token; None if that is not in the batch."""
        index = self.num_prompt_tokens - 1 - self.first_row
        return index if 0 <= index < self.num_rows else None


class DraftRows:
    """Writes, once per step, which table row every token of the batch uses.

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
        head = model.model.head
        self._rows: RowTable = model.model.rows
        self._rules = row_rules(head.compress, head.global_feature)
        connector = receiving_connector(kv_transfer)
        self.table = ImageTable(model.model.adaptor, self._rows.codes.num_slots, connector)
        self._has_slots = head.has_adaptor
        self._tokens = ImageTokens.of(model.model)
        self._choices = Choices.of(model.model)
        self._layouts: dict[str, tuple[Sequence[FeatureLike], RequestLayout]] = {}
        self._max_layouts = 4 * max_num_requests
        self._warned: set[tuple[str, ImageRun]] = set()
        self._held: HeldRows | None = None
        self._last: Round | None = None

    @property
    def has_gate(self) -> bool:
        """Whether a gate decides at the ends of prompts; else nothing reads their lengths."""
        return self._choices is not None

    def clear(self) -> None:
        """Forget all images, e.g. after new weights."""
        self.table.clear()
        if self._tokens is not None:
            self._tokens.clear()
        self._held = self._last = None

    def reset_encoder_cache(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands for vLLM's method of this name, which is called when weights are replaced.

        What was computed from the old vision tower must go with the encoder cache.
        """
        self.clear()
        return original(*args, **kwargs)

    def holds(self, request_ids: list[str], first_rows: list[int], num_rows: int) -> bool:
        """Whether the last batch's rows serve this one, so that it needs no `fill`.

        So it is in most decoding rounds of one request, or of several without images: the same
        requests, all further on, as many rows, and no image that was not there before. Never where
        a gate decides, for which any round may hold a prompt's end.

        Args:
            request_ids: The batch's requests, in its order.
            first_rows: See `RequestRows`.
            num_rows: Rows of the whole batch.
        """
        last, held = self._last, self._held
        known = (
            last is not None
            and held is not None
            and self._choices is None
            and held.written == self.table.stats.computed
            and last.leads_to(request_ids, first_rows, num_rows)
        )
        # The runner changes its list in place.
        ids = last.request_ids if known and last is not None else list(request_ids)
        self._last = Round(ids, first_rows, num_rows)
        return known

    def fill(
        self,
        requests: Sequence[RequestRows],
        embeddings: Mapping[str, torch.Tensor],
        hidden_states: torch.Tensor | None = None,
    ) -> None:
        """Set the codes of a batch, requests in batch order.

        Args:
            requests: All requests of the batch.
            embeddings: Vision-tower output by item hash, whatever is at hand in this step.
            hidden_states: The target's, ``[T, D]``; read only where a gate decides.
        """
        self.table.begin_step()
        choices = self._choose(requests, hidden_states)
        codes = [self._single_code(request, embeddings) for request in requests]
        num_rows = [request.num_rows for request in requests]
        total = sum(num_rows)
        if codes and codes[0] is not None and _is_uniform(codes) and _is_uniform(choices):
            self._set_uniform(codes[0], choices[0], total)
            return
        codes_T = self._row_codes(requests, codes, embeddings)
        self._held = self._last = None
        self._upload(codes_T)
        if self._choices is not None:
            self._upload_choices(np.repeat(np.array(choices, dtype=np.int32), num_rows))
        if self._tokens is not None:
            self._tokens.put_rows()

    def _row_codes(
        self,
        requests: Sequence[RequestRows],
        codes: Sequence[int | None],
        embeddings: Mapping[str, torch.Tensor],
    ) -> np.ndarray:
        """Return the codes of all rows, int32 ``[T]``, given those of requests that have one."""
        codes_T = np.empty(sum(request.num_rows for request in requests), dtype=np.int32)
        begin = 0
        for request, code in zip(requests, codes, strict=True):
            rows = codes_T[begin : begin + request.num_rows]
            if code is None:
                self._fill_request(request, embeddings, begin, rows)
            else:
                rows[:] = code
            begin += request.num_rows
        return codes_T

    def move(self, token_indices: torch.Tensor) -> None:
        """Let row ``i`` of the batch be what row ``token_indices[i]`` was.

        Before the draft steps: one row for each request. Drafts are text; what follows the last row
        of an unfinished prompt is thrown away.
        """
        # Rows of one code serve as they are, unless more of them are needed (draft trees).
        num_rows = token_indices.shape[0]
        if self._held is None or num_rows > self._held.num_rows:
            self._rows.keep_rows(token_indices)
            self._held = self._held and self._held._replace(num_rows=num_rows)

    def _choose(
        self, requests: Sequence[RequestRows], hidden_states: torch.Tensor | None
    ) -> list[int]:
        """Return the requests' choices, after the gate decided where prompts end in this batch."""
        if self._choices is None:
            return [0] * len(requests)
        ends: list[tuple[str, int]] = []
        begin = 0
        for request in requests:
            end = request.prompt_end
            if end is not None and request.features and self._layout(request).runs:
                ends.append((request.request_id, begin + end))
            begin += request.num_rows
        if ends and hidden_states is not None:
            self._choices.decide(ends, hidden_states)
        return [self._choices.choice_of(request.request_id) for request in requests]

    def _single_code(
        self, request: RequestRows, embeddings: Mapping[str, torch.Tensor]
    ) -> int | None:
        """Return the code of all the request's rows where they have one, behind its images."""
        layout = self._layout(request) if request.features else None
        if layout is None or not layout.runs:
            return self._rows.codes.text(0)
        if request.first_row < layout.stop_row:
            return None
        return self._rows.codes.text(self._slot_of(request, layout.runs[-1], embeddings) or 0)

    def _slot_of(
        self, request: RequestRows, run: ImageRun, embeddings: Mapping[str, torch.Tensor]
    ) -> int | None:
        if not self._has_slots:
            return None
        slot = self.table.slot_of(run, embeddings)
        # A run that ends later is looked up again; its first rows are holes either way.
        if slot is None and run.text_row < request.first_row + request.num_rows:
            self._note_miss(request.request_id, run)
        return slot

    def _fill_request(
        self,
        request: RequestRows,
        embeddings: Mapping[str, torch.Tensor],
        begin: int,
        out: np.ndarray,
    ) -> None:
        def slot_of(run: ImageRun) -> int | None:
            return self._slot_of(request, run, embeddings)

        layout = self._layout(request)
        self._rules.write(layout, self._rows.codes, slot_of, request.first_row, out)
        if self._tokens is None:
            return
        for run in self._tokens.write_codes(layout, request.first_row, begin, embeddings, out):
            self._note_miss(request.request_id, run)

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
        layout = self._rules.build_layout(request.features)
        self._layouts[request.request_id] = (request.features, layout)
        return layout

    def _set_uniform(self, code: int, choice: int, count: int) -> None:
        """Set a batch whose tokens all have one code, unless the device holds it already.

        So it is with one request that decodes, and with any number of requests without images.
        """
        made = 0 if self._choices is None else self._choices.version
        wanted = HeldRows(code, choice, count, self.table.stats.computed + made)
        if self._held is None or not self._held.covers(wanted):
            self._upload(np.full(count, code, dtype=np.int32))
            if self._choices is not None:
                self._upload_choices(np.full(count, choice, dtype=np.int32))
            self._held = wanted

    def _upload(self, codes_T: np.ndarray) -> None:
        self._rows.set_batch(np_to_pinned_tensor(codes_T))

    def _upload_choices(self, choices_T: np.ndarray) -> None:
        assert isinstance(self._rows, GatedRowTable)
        self._rows.set_choices(np_to_pinned_tensor(choices_T))


def _is_uniform(values: Sequence[int | None]) -> bool:
    return values.count(values[0]) == len(values)

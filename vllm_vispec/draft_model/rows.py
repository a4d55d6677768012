"""What a published model needs beside tokens: rotary positions and image features by row.

A row of the batch is a token at its own position, as in the target's pass. The draft's rotary
positions are that position plus an offset. Offsets hold for all runners and passes alike: they
depend on the absolute position in a prompt, and behind a request's images they are one number.

Shapes: T tokens in the batch, R requests, L prompt tokens up to the end of the last image, A rotary
axes (3 with M-RoPE, else 1), N image tokens of the batch, D the draft's hidden size.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from vllm.utils.torch_utils import np_to_pinned_tensor

from vllm_vispec.spec_decode.step import RequestRows
from vllm_vispec.utils.errors import ViSpecError

FEATURES = "vispec_draft_features"
"""Attribute of the target's image features: the draft's, of the same image. It lives as long."""


class Stretch(NamedTuple):
    """Prompt tokens ``[begin, end)`` that stand for features ``[first, ...)`` of one image."""

    begin: int
    end: int
    identifier: str
    first: int


class Prompt(NamedTuple):
    """What a prompt's images mean for the draft.

    Attributes:
        stretches: Image tokens, in prompt order.
        offset_AL: int64; what to add to positions.
        delta: The same for all tokens behind.
    """

    stretches: tuple[Stretch, ...]
    offset_AL: np.ndarray
    delta: int

    @property
    def stop(self) -> int:
        """First position behind all images."""
        return self.offset_AL.shape[1]


class DraftPositions(nn.Module):
    """Static buffers of offsets and positions; graphs hold their addresses.

    Args:
        num_axes: A.
        max_num_tokens: Longest batch.
        max_num_requests: Most requests in a batch.
    """

    offset_AT: torch.Tensor
    after_R: torch.Tensor
    position_AT: torch.Tensor

    def __init__(self, num_axes: int, max_num_tokens: int, max_num_requests: int) -> None:
        super().__init__()
        # One column more keeps slices apart from whole tensors, as vLLM's own M-RoPE buffers do.
        for name, shape in (
            ("offset_AT", (num_axes, max_num_tokens)),
            ("after_R", (max_num_requests,)),
            ("position_AT", (num_axes, max_num_tokens + 1)),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64), persistent=False)
        self.num_axes = num_axes
        # What all of `offset_AT` and `after_R` holds; None: several values.
        self._value: int | None = 0

    def fill(self, value: int) -> None:
        """Give all rows, and all that follow, one offset."""
        if value != self._value:
            self.offset_AT.fill_(value)
            self.after_R.fill_(value)
            self._value = value

    def set_step(self, offset_AT: np.ndarray, after_R: np.ndarray) -> None:
        """Take the offsets of a batch's rows and of its requests' draft steps."""
        self._value = None
        num_tokens, num_requests = offset_AT.shape[1], len(after_R)
        joined = np_to_pinned_tensor(np.concatenate([offset_AT.ravel(), after_R]))
        device = joined.to(self.after_R.device, non_blocking=True)
        rows, after = device.split([offset_AT.size, num_requests])
        self.offset_AT[:, :num_tokens] = rows.view(self.num_axes, num_tokens)
        self.after_R[:num_requests] = after

    def begin_steps(self, num_requests: int) -> None:
        """Let row ``i`` be the next token of request ``i``."""
        if self._value is None:
            self.offset_AT[:, :num_requests] = self.after_R[:num_requests]

    def select_rows(self, token_indices: torch.Tensor) -> None:
        """Let row ``i`` of the batch be what row ``token_indices[i]`` was."""
        if self._value is None:
            self.offset_AT[:, : token_indices.shape[0]] = self.offset_AT[:, token_indices]

    def of(self, position_T: torch.Tensor) -> torch.Tensor:
        """Return rotary positions ``[A, T]``, or ``[T]`` for one axis."""
        count = position_T.shape[0]
        out_AT = self.position_AT[:, :count]
        torch.add(self.offset_AT[:, :count], position_T, out=out_AT)
        return out_AT if self.num_axes > 1 else out_AT[0]


class PublishedRows:
    """Stands where `spec_decode.draft_rows.DraftRows` stands for heads.

    Args:
        model: The draft, see `model`.
    """

    gate = None

    def __init__(self, model: Any) -> None:
        self._model = model
        self._positions: DraftPositions = model.positions
        self._no_images = Prompt((), np.zeros((model.positions.num_axes, 0), dtype=np.int64), 0)
        self._known: dict[str, tuple[Any, Prompt]] = {}
        self.features: tuple[list[torch.Tensor], torch.Tensor] | None = None

    def note(self, request_id: str, features: Sequence[Any], tokens: Sequence[int]) -> None:
        """Lay out a request's prompt, unless that is done, before its images are forgotten.

        Args:
            request_id: vLLM's id. It may be reused; the features tell whether it was.
            features: Its multimodal items.
            tokens: Its prompt, or what is recomputed of it and its answer.
        """
        known = self._known.get(request_id)
        if known is None or known[0] is not features:
            self._known[request_id] = (features, self._lay_out(features, tokens))

    def keep(self, request_ids: Collection[str]) -> None:
        """Forget all other requests."""
        for request_id in self._known.keys() - request_ids:
            del self._known[request_id]

    def forget(self, request_id: str) -> None:
        """Forget a request."""
        self._known.pop(request_id, None)

    def serves_step(self, request_ids: list[str], first_rows: list[int], num_rows: int) -> bool:
        """Return False: a step costs little enough to be laid out each time."""
        return False

    def set_step(
        self,
        requests: Sequence[RequestRows],
        outputs: Mapping[str, torch.Tensor],
        hidden_states: torch.Tensor | None = None,
    ) -> None:
        """Lay out a batch: offsets, and `features`, the images' rows in it.

        Args:
            requests: All requests of the batch, in its order.
            outputs: The target's image features by item hash; each holds the draft's.
            hidden_states: Not read.

        Raises:
            ViSpecError: An image's features are not there.
        """
        prompts = [self._prompt(request) for request in requests]
        self.features = self._gather(requests, prompts, outputs)
        values = {prompt.delta for prompt in prompts}
        inside = any(r.first_row < p.stop for r, p in zip(requests, prompts, strict=True))
        if not inside and len(values) == 1:
            self._positions.fill(values.pop())
            return
        parts = [_offsets(*pair) for pair in zip(requests, prompts, strict=True)]
        after_R = np.array([prompt.delta for prompt in prompts], dtype=np.int64)
        self._positions.set_step(np.concatenate(parts, axis=1), after_R)

    def begin_steps(self, token_indices: torch.Tensor) -> None:
        """Let row ``i`` be the next token of request ``i``, whose last row was given."""
        self._positions.begin_steps(token_indices.shape[0])

    def select_rows(self, token_indices: torch.Tensor) -> None:
        """Let row ``i`` of the batch be what row ``token_indices[i]`` was."""
        self._positions.select_rows(token_indices)

    def reset_encoder_cache(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call vLLM's method: the draft's features go with the target's."""
        return original(*args, **kwargs)

    def _prompt(self, request: RequestRows) -> Prompt:
        # Dummy batches invent request ids, without features.
        return self._known[request.request_id][1] if request.features else self._no_images

    def _lay_out(self, features: Sequence[Any], tokens: Sequence[int]) -> Prompt:
        stretches = tuple(sorted(_stretches(features)))
        stop = stretches[-1].end if stretches else 0
        if self._positions.num_axes == 1:
            return Prompt(stretches, np.zeros((1, stop), dtype=np.int64), 0)
        position_AL, delta = self._model.rotary_positions(list(tokens), list(features))
        offset_AL = position_AL[:, :stop].long().numpy() - np.arange(stop)
        return Prompt(stretches, offset_AL, int(delta))

    def _gather(
        self,
        requests: Sequence[RequestRows],
        prompts: Sequence[Prompt],
        outputs: Mapping[str, torch.Tensor],
    ) -> tuple[list[torch.Tensor], torch.Tensor] | None:
        """Return the draft's features of the batch's image rows, and where they are, bool ``[T]``.

        None if the batch has no image row.
        """
        found: list[torch.Tensor] = []
        is_image_T = torch.zeros(sum(request.num_rows for request in requests), dtype=torch.bool)
        begin = 0
        for request, prompt in zip(requests, prompts, strict=True):
            stop = request.first_row + request.num_rows
            for one in prompt.stretches if request.first_row < prompt.stop else ():
                low, high = max(one.begin, request.first_row), min(one.end, stop)
                if low >= high:
                    continue
                features_ND = _features_of(one.identifier, outputs)
                first = one.first - one.begin
                found.append(features_ND[first + low : first + high])
                start = begin - request.first_row
                is_image_T[start + low : start + high] = True
            begin += request.num_rows
        return (found, is_image_T) if found else None


def _offsets(request: RequestRows, prompt: Prompt) -> np.ndarray:
    """Return the offsets of a request's rows, ``[A, rows]``."""
    part_AT = prompt.offset_AL[:, request.first_row : request.first_row + request.num_rows]
    missing = request.num_rows - part_AT.shape[1]
    return np.pad(part_AT, ((0, 0), (0, missing)), constant_values=prompt.delta)


def _stretches(features: Sequence[Any]) -> list[Stretch]:
    found = []
    for feature in features:
        taken = 0
        for first, last in feature.mm_position.extract_embeds_range():
            found.append(Stretch(first, last + 1, feature.identifier, taken))
            taken += last + 1 - first
    return found


def _features_of(identifier: str, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    features: torch.Tensor | None = getattr(outputs.get(identifier), FEATURES, None)
    if features is None:
        raise ViSpecError(
            f"the draft has no features of item {identifier}: the target's came from elsewhere "
            "than its vision tower (embeddings in the prompt, a cache connector); draft with a "
            "head, or serve this target without speculation"
        )
    return features

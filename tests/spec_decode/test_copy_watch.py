"""The watch that engine tests use for copies between host and device sees what it has to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from vllm.utils.torch_utils import async_tensor_h2d, np_to_pinned_tensor

from tests.support.copy_watch import CopyWatch

# As vLLM's runners hold it: an object, where "cpu" is a string.
DEVICE = torch.device("cpu")
ROWS = torch.arange(12.0)
INDEX = torch.tensor([1, 2])
Call = Callable[[], object]


def watched(call: Call, own: str = "/tests/spec_decode/") -> CopyWatch:
    watch = CopyWatch(own)
    with watch.watching():
        call()
    return watch


def on_host(*values: float) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32))


def set_rows(index: object, value: object) -> None:
    ROWS.clone()[index] = value


UPLOADS: dict[str, Call] = {
    "list": lambda: async_tensor_h2d([1, 2], DEVICE),
    "array": lambda: async_tensor_h2d(np.arange(3), DEVICE),
    "buffer": lambda: ROWS.clone()[:2].copy_(
        np_to_pinned_tensor(np.zeros(2, dtype=np.float32)), non_blocking=True
    ),
}
FREE: dict[str, Call] = {
    "arithmetic": lambda: (ROWS[2:5] * 2 + 1).sum(),
    "index": lambda: ROWS[INDEX],
    "scalar": lambda: set_rows(INDEX, 3.0),
    "mask": lambda: ROWS.masked_fill(ROWS > 3, 0),
    "repeats": lambda: INDEX.repeat_interleave(INDEX, output_size=3),
    "host's": lambda: on_host(1, 2, 3)[torch.tensor([0, 1])].numpy(),
    "uploaded": lambda: ROWS[async_tensor_h2d([1, 2], DEVICE)],
}
COSTLY: list[tuple[str, Call]] = [
    ("pageable copy", lambda: torch.tensor([1, 2], device=DEVICE)),
    ("waits for a copy", lambda: torch.arange(3).to(DEVICE)),
    ("copies pageable", lambda: torch.arange(3).to(DEVICE, non_blocking=True)),
    ("copy_ waits", lambda: ROWS.clone()[:2].copy_(on_host(1, 2))),
    ("tolist reads", lambda: ROWS.tolist()),
    ("item reads", lambda: (ROWS + 1).sum().item()),
    ("__bool__ reads", lambda: bool(ROWS[0] > 1)),
    ("cpu reads back", lambda: ROWS.cpu()),
    ("to reads back", lambda: ROWS.to("cpu", non_blocking=True)),
    ("tolist reads", lambda: async_tensor_h2d([1, 2], DEVICE).tolist()),
    ("index is copied", lambda: ROWS[[1, 2]]),
    ("index is copied", lambda: ROWS[torch.tensor([1, 2])]),
    ("value is copied", lambda: set_rows(slice(0, 2), on_host(1, 2))),
    ("index waits", lambda: ROWS[ROWS > 3]),
    ("slice reads", lambda: ROWS[: INDEX[0]]),
    ("nonzero waits", lambda: ROWS.nonzero()),
    ("where waits", lambda: torch.where(ROWS > 1)),
    ("repeat_interleave waits", lambda: INDEX.repeat_interleave(INDEX)),
    ("mixes", lambda: torch.index_select(ROWS, 0, torch.tensor([1]))),
    ("arange reads", lambda: torch.arange(INDEX[1], device=DEVICE)),
]


@pytest.mark.parametrize("name", UPLOADS)
def test_uploads_are_counted(name: str) -> None:
    watch = watched(UPLOADS[name])
    assert not watch.violations
    assert list(watch.uploads) == ["test_copy_watch.py:<lambda>"]


@pytest.mark.parametrize("name", FREE)
def test_work_on_one_side_is_free(name: str) -> None:
    assert not watched(FREE[name]).violations


@pytest.mark.parametrize(("what", "call"), COSTLY)
def test_what_the_host_would_wait_for_is_noted(what: str, call: Call) -> None:
    (said,) = watched(call).violations
    assert what in said
    # Calls by others are theirs.
    assert not watched(call, own="/vllm_vispec/").violations

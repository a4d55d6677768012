"""Decoding steps whose rows the device has already, and those whose drafts it has cut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.heads import BASE
from vllm_vispec.spec_decode.draft_rows import DraftRows
from vllm_vispec.spec_decode.row_table import RowTable
from vllm_vispec.spec_decode.speculator import moved_rows
from vllm_vispec.spec_decode.step import RequestRows, RowIds

IMAGE = SimpleNamespace(
    modality="image",
    identifier="picture",
    mm_position=SimpleNamespace(extract_embeds_range=lambda: [(2, 5)]),
)


def make_rows() -> DraftRows:
    size = BASE.hidden_size
    adaptor = SimpleNamespace(
        attend=lambda embeddings: SimpleNamespace(value=embeddings),
        project=lambda value: torch.zeros(BASE.num_query_tokens, size),
    )
    fusion = SimpleNamespace(offset=lambda global_D: global_D)
    table = RowTable(RowIds(4, BASE.num_query_tokens), size, 512)
    inner = SimpleNamespace(head=BASE, rows=table, fusion=fusion, adaptor=adaptor, compressor=None)
    return DraftRows(SimpleNamespace(model=inner), 8)  # type: ignore[arg-type]


def play(rows: DraftRows, ids: list[str], first: list[int], each: int) -> bool:
    """One step as the proposers play it; returns whether nothing had to be set."""
    serves = rows.serves_step(ids, first, each * len(ids))
    if not serves:
        requests = [
            RequestRows(name, (IMAGE,) if name[0] == "p" else (), at, each)
            for name, at in zip(ids, first, strict=True)
        ]
        rows.set_step(requests, {"picture": np.zeros((4, 8))})
    return serves


def ids_of(rows: DraftRows, count: int) -> list[int]:
    return rows._rows.row_ids[:count].tolist()


def test_a_decoding_request_is_set_once() -> None:
    rows = make_rows()
    assert [play(rows, ["p"], [at], 3) for at in (9, 11, 12)] == [False, True, True]
    assert len(set(ids_of(rows, 3))) == 1
    # New weights are noticed.
    rows.clear()
    assert not play(rows, ["p"], [13], 3)


def test_two_requests_behind_different_images_are_set_each_time() -> None:
    rows = make_rows()
    assert [play(rows, ["p", "t"], [9 + i, 9 + i], 3) for i in range(3)] == [False] * 3


@pytest.mark.parametrize(
    ("ids", "first", "each"),
    [
        (["p", "t"], [12, 12], 3),  # another request joins
        (["t"], [12], 3),  # another request in its place
        (["p"], [12], 4),  # more rows
        (["p"], [3], 3),  # preempted: back inside its prompt
    ],
)
def test_whatever_changes_is_set_again(ids: list[str], first: list[int], each: int) -> None:
    rows, fresh = make_rows(), make_rows()
    play(rows, ["p"], [9], 3)
    assert not play(rows, ids, first, each)
    # As if nothing had been before; the image has the same slot.
    play(fresh, ids, first, each)
    assert ids_of(rows, each * len(ids)) == ids_of(fresh, each * len(ids))


def test_rows_of_one_id_are_selected_only_if_there_are_too_few() -> None:
    rows, selected = make_rows(), []
    rows._rows.select_rows = lambda token_indices: selected.append(  # type: ignore[method-assign]
        len(token_indices)
    )
    play(rows, ["p"], [9], 3)
    rows.select_rows(torch.tensor([2]))
    rows.select_rows(torch.tensor([0, 0, 0, 0]))
    play(rows, ["p", "t"], [12, 12], 3)
    rows.select_rows(torch.tensor([2, 5]))
    assert selected == [4, 2]


def test_a_chunk_of_masked_rows_serves_no_later_step() -> None:
    """All rows have one id, but the text behind the image will have another."""
    rows = make_rows()
    assert [play(rows, ["p"], [at], 1) for at in (2, 3, 5)] == [False] * 3


def batch(drafts: list[int], kept: list[int], others: list[int]) -> Any:
    """A batch as vLLM lays it out: requests with drafts first, the host's cut an even one."""
    total = sum(kept)
    even = [total // len(kept) + (i < total % len(kept)) for i in range(len(kept))]
    host = np.cumsum([0, *(1 + n for n in even), *others], dtype=np.int32)
    device = torch.tensor([0, *(1 + n for n in kept), *others]).cumsum(0).to(torch.int32)
    given = np.array(drafts + [0] * len(others), dtype=np.int32)
    return SimpleNamespace(
        num_reqs=len(kept) + len(others),
        num_draft_tokens=total,
        num_draft_tokens_per_req=given,
        query_start_loc_np=host,
        query_start_loc=device,
    )


def test_codes_move_with_their_requests() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        kept = generator.integers(0, 4, size=5).tolist()
        one = batch([3] * 5, kept, [4, 2])
        found = moved_rows(one)
        if found is None:
            # All or nothing is verified: the host knows where everything is.
            assert sum(kept) in (0, 15)
            continue
        starts = one.query_start_loc_np
        codes = torch.repeat_interleave(
            torch.arange(7), torch.from_numpy(np.diff(starts).astype(np.int64))
        )
        codes[: len(found)] = codes[found]
        lengths = (one.query_start_loc[1:] - one.query_start_loc[:-1]).long()
        assert codes.tolist() == torch.repeat_interleave(torch.arange(7), lengths).tolist()

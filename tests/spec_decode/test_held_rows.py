"""Decoding rounds whose row codes the device holds already."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.heads import BASE
from vllm_vispec.spec_decode.draft_rows import DraftRows, RequestRows
from vllm_vispec.spec_decode.layout import RowCodes
from vllm_vispec.spec_decode.row_table import RowTable

IMAGE = SimpleNamespace(
    modality="image",
    identifier="picture",
    mm_position=SimpleNamespace(extract_embeds_range=lambda: [(2, 5)]),
)


class Adaptor:
    """Counts what it is asked for and writes nothing."""

    def partial(self, embeddings: Any) -> SimpleNamespace:
        return SimpleNamespace(value=embeddings)

    def store(self, slot: int, value: Any) -> None:
        return


def make_rows() -> DraftRows:
    table = RowTable(RowCodes(4, BASE.num_query_tokens), BASE.hidden_size, 512)
    inner = SimpleNamespace(head=BASE, rows=table, adaptor=Adaptor(), compressor=None)
    return DraftRows(SimpleNamespace(model=inner), 8)  # type: ignore[arg-type]


def play(rows: DraftRows, ids: list[str], first: list[int], each: int) -> bool:
    """One round as the proposers play it; returns whether nothing had to be filled."""
    holds = rows.holds(ids, first, each * len(ids))
    if not holds:
        requests = [
            RequestRows(name, (IMAGE,) if name[0] == "p" else (), at, each)
            for name, at in zip(ids, first, strict=True)
        ]
        rows.fill(requests, {"picture": np.zeros((4, 8))})
    return holds


def codes_of(rows: DraftRows, count: int) -> list[int]:
    return rows._rows.row_codes[:count].tolist()


def test_a_decoding_request_is_filled_once() -> None:
    rows = make_rows()
    assert [play(rows, ["p"], [at], 3) for at in (9, 11, 12)] == [False, True, True]
    assert len(set(codes_of(rows, 3))) == 1


@pytest.mark.parametrize(
    ("ids", "first", "each"),
    [
        (["p", "t"], [12, 12], 3),  # another request joins
        (["t"], [12], 3),  # another request in its place
        (["p"], [12], 4),  # more rows
        (["p"], [3], 3),  # preempted: back inside its prompt
    ],
)
def test_whatever_changes_is_filled_again(ids: list[str], first: list[int], each: int) -> None:
    rows, fresh = make_rows(), make_rows()
    play(rows, ["p"], [9], 3)
    assert not play(rows, ids, first, each)
    # As if nothing had been before; the image has the same slot.
    play(fresh, ids, first, each)
    assert codes_of(rows, each * len(ids)) == codes_of(fresh, each * len(ids))


def test_two_requests_behind_different_images_are_filled_each_time() -> None:
    rows = make_rows()
    assert [play(rows, ["p", "t"], [9 + i, 9 + i], 3) for i in range(3)] == [False] * 3


def test_new_weights_are_noticed() -> None:
    rows = make_rows()
    play(rows, ["t"], [9], 3)
    rows.clear()
    assert not play(rows, ["t"], [10], 3)

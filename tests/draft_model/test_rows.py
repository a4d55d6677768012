"""Offsets of rotary positions and image features, row by row.

Shapes: A rotary axes, T tokens, N image tokens, D the draft's hidden size.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from vllm.multimodal.inputs import PlaceholderRange

from vllm_vispec.compressors.spec import CompressorSpec
from vllm_vispec.draft_model.rows import FEATURES, DraftPositions, PublishedRows
from vllm_vispec.spec_decode.step import RequestRows
from vllm_vispec.utils.errors import ViSpecError

# Tokens 2 to 5 are an image of 2 x 2, at one position in time; text goes on at position 4.
TEXT_BEFORE, IMAGE_ROWS = 2, 4
ROTARY_AT = torch.tensor(
    [
        [0, 1, 2, 2, 2, 2, 4, 5, 6],
        [0, 1, 2, 2, 3, 3, 4, 5, 6],
        [0, 1, 2, 3, 2, 3, 4, 5, 6],
    ]
)


def _positions() -> DraftPositions:
    return DraftPositions(3, 32)


def _feature(identifier: str, *stretches: tuple[int, int]) -> Any:
    first, stop = stretches[0][0], stretches[-1][1] + 1
    is_embed = torch.zeros(stop - first, dtype=torch.bool)
    for low, high in stretches:
        is_embed[low - first : high + 1 - first] = True
    place = PlaceholderRange(first, stop - first, is_embed)
    return SimpleNamespace(identifier=identifier, mm_position=place)


IMAGE = _feature("image", (TEXT_BEFORE, TEXT_BEFORE + IMAGE_ROWS - 1))


def _outputs() -> dict[str, torch.Tensor]:
    target_ND = torch.zeros(IMAGE_ROWS, 3)
    setattr(target_ND, FEATURES, torch.arange(IMAGE_ROWS).unsqueeze(1))
    return {"image": target_ND}


def _request(first_row: int, num_rows: int, *features: Any) -> RequestRows:
    return RequestRows("any", features, first_row, num_rows)


@pytest.mark.parametrize(("first", "stop"), [(0, 9), (3, 5), (5, 9)])
def test_a_chunk_has_the_targets_positions(first: int, stop: int) -> None:
    positions, rows = _positions(), slice(first, stop)
    positions.set_step(ROTARY_AT[:, rows], torch.arange(first, stop))
    assert positions(torch.arange(first, stop)).equal(ROTARY_AT[:, rows])


def test_steps_go_on_behind_each_requests_last_row() -> None:
    positions = _positions()
    # Text at 3 and 4; an image's last token and text behind it; a prompt that ends in an image.
    rotary_AT = torch.cat([torch.tensor([[3, 4]] * 3), ROTARY_AT[:, 5:7], ROTARY_AT[:, :6]], dim=1)
    positions.set_step(rotary_AT, torch.tensor([3, 4, 5, 6, 0, 1, 2, 3, 4, 5]))
    positions.begin_steps(torch.tensor([1, 3, 9]))
    for step in range(2):
        found = positions(torch.tensor([5, 7, 6]) + step)
        assert found.tolist() == [[5 + step, 5 + step, 4 + step]] * 3
    # A level of a tree has several rows for each request.
    PublishedRows(positions).select_rows(torch.arange(3).repeat_interleave(2))
    assert positions(torch.tensor([7, 7, 9, 9, 8, 8])).tolist() == [[7, 7, 7, 7, 6, 6]] * 3


def test_rows_that_nobody_reads_have_positions_of_the_table() -> None:
    positions = DraftPositions(1, 32)
    positions.hide_images(np.full(4, -9))
    assert positions(torch.tensor([12, 1, 2, 0])).tolist() == [3, 0, 0, 0]


def test_buffers_stay_where_they_are() -> None:
    positions = _positions()
    first = positions(torch.arange(4))
    positions.set_step(ROTARY_AT, torch.arange(9))
    positions.begin_steps(torch.tensor([8]))
    assert positions(torch.arange(4)).data_ptr() == first.data_ptr()


def test_a_chunk_gets_its_part_of_the_features() -> None:
    rows = PublishedRows(None)
    rows.set_step([_request(0, 2), _request(3, 5, IMAGE)], _outputs())
    assert rows.features is not None
    (part_ND,), is_image_T = rows.features
    assert part_ND.flatten().tolist() == [1, 2, 3]
    assert is_image_T.tolist() == [False, False, True, True, True, False, False]


def test_tokens_between_an_images_tiles_are_text() -> None:
    rows = PublishedRows(None)
    rows.set_step([_request(3, 4, _feature("image", (2, 3), (5, 6)))], _outputs())
    assert rows.features is not None
    parts, is_image_T = rows.features
    assert torch.cat(parts).flatten().tolist() == [1, 2, 3]
    assert is_image_T.tolist() == [True, False, True, True]


@pytest.mark.parametrize(("first", "count"), [(0, 2), (6, 3)])
def test_rows_beside_images_need_no_features(first: int, count: int) -> None:
    rows = PublishedRows(None)
    rows.set_step([_request(first, count, IMAGE)], {})
    assert rows.features is None


@pytest.mark.parametrize(
    ("last", "now", "is_served"),
    [
        ((6, 3), (8, 3), True),
        ((0, 2), (2, 2), False),  # into the image
        ((6, 3), (0, 3), False),  # preempted
        ((6, 3), (8, 2), False),
        ((4, 3), (7, 3), False),  # out of the image
    ],
)
def test_rows_behind_the_images_serve_again(
    last: tuple[int, int], now: tuple[int, int], is_served: bool
) -> None:
    rows = PublishedRows(None)
    rows.set_step([_request(*last, IMAGE)], _outputs())
    assert rows.serves_step(["any"], [now[0]], now[1]) is is_served
    assert not rows.serves_step(["other"], [now[0]], now[1])


@pytest.mark.parametrize(
    ("first", "hidden", "position"),
    [
        (0, [0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 2, 3]),
        (4, [1, 1, 0, 0, 0, 0, 0, 0], [2, 3, 4, 5, 6, 7]),
        (9, [0] * 8, [5, 6, 7, 8, 9, 10, 11, 12]),
    ],
)
def test_text_counts_without_hidden_images(
    first: int, hidden: list[int], position: list[int]
) -> None:
    positions, masks = _positions(), Mock()
    rows = PublishedRows(positions, masks, CompressorSpec("text_only"))
    rows.set_step([_request(first, 8, IMAGE)], {})
    (written_T,) = masks.write_masks.call_args.args
    assert written_T.tolist() == hidden
    found = positions(torch.arange(first, first + 8))[:, ~written_T]
    assert found.tolist() == [position] * 3
    rows.begin_steps(torch.tensor([7]))
    assert masks.clear_masks.called
    assert positions(torch.tensor([first + 8])).tolist() == [[position[-1] + 1]] * 3


@pytest.mark.parametrize(
    ("first", "count", "hidden", "features"),
    [
        (0, 8, [0, 0, 0, 1, 0, 1, 0, 0], [0, 1]),
        (3, 2, [1, 0], [1]),
        (5, 2, [1, 0], []),
    ],
)
@pytest.mark.parametrize("name", ["prune", "pool"])
def test_a_share_of_an_images_rows_is_seen(
    name: str, first: int, count: int, hidden: list[int], features: list[int]
) -> None:
    masks = Mock()
    rows = PublishedRows(None, masks, CompressorSpec(name, 2))
    rows.set_step([_request(first, count, IMAGE)], _outputs())
    (written_T,) = masks.write_masks.call_args.args
    assert written_T.tolist() == hidden
    found = [] if rows.features is None else rows.features[0]
    assert [int(one) for part_ND in found for one in part_ND] == features


def test_features_from_elsewhere_are_refused() -> None:
    rows = PublishedRows(None)
    with pytest.raises(ViSpecError, match="no features of item image"):
        rows.set_step([_request(0, 4, IMAGE)], {"image": torch.zeros(IMAGE_ROWS, 3)})

"""Offsets of rotary positions and image features, row by row, on a made-up model."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_vispec.draft_model.rows import FEATURES, DraftPositions, PublishedRows
from vllm_vispec.spec_decode.step import RequestRows
from vllm_vispec.utils.errors import ViSpecError

# Tokens 2 to 5 are an image of 2 x 2, at one position in time; text goes on at position 4.
TEXT_BEFORE, IMAGE_ROWS, LENGTH = 2, 4, 9
ROTARY = [
    [0, 1, 2, 2, 2, 2, 4, 5, 6],
    [0, 1, 2, 2, 3, 3, 4, 5, 6],
    [0, 1, 2, 3, 2, 3, 4, 5, 6],
]


def _feature(identifier: str, first: int, last: int) -> Any:
    position = SimpleNamespace(extract_embeds_range=lambda: [(first, last)])
    return SimpleNamespace(identifier=identifier, mm_position=position)


IMAGE = [_feature("image", TEXT_BEFORE, TEXT_BEFORE + IMAGE_ROWS - 1)]


def _rows(num_axes: int = 3) -> PublishedRows:
    def rotary(tokens: list[int], features: list[Any]) -> tuple[torch.Tensor, int]:
        assert (len(tokens), features) == (LENGTH, IMAGE)
        return torch.tensor(ROTARY), ROTARY[0][-1] + 1 - LENGTH

    model = SimpleNamespace(positions=DraftPositions(num_axes, 32, 4), rotary_positions=rotary)
    rows = PublishedRows(model)
    rows.note("seen", IMAGE, list(range(LENGTH)))
    return rows


def _outputs() -> dict[str, torch.Tensor]:
    target = torch.zeros(IMAGE_ROWS, 3)
    setattr(target, FEATURES, torch.arange(IMAGE_ROWS * 2.0).view(IMAGE_ROWS, 2))
    return {"image": target}


def _request(name: str, first_row: int, num_rows: int) -> RequestRows:
    features: Sequence[Any] = IMAGE if name == "seen" else ()
    return RequestRows(name, features, first_row, num_rows)


def test_chunks_have_the_models_own_positions() -> None:
    rows = _rows()
    found = []
    for first, count in ((0, 3), (3, 2), (5, 4)):
        rows.set_step([_request("seen", first, count)], _outputs())
        found.append(rows._positions.of(torch.arange(first, first + count)).clone())
    assert torch.cat(found, dim=1).tolist() == ROTARY


def test_text_beside_an_image_and_the_steps_behind() -> None:
    rows = _rows()
    rows.set_step([_request("plain", 3, 2), _request("seen", 5, 4)], _outputs())
    position = rows._positions.of(torch.tensor([3, 4, 5, 6, 7, 8]))
    assert position.tolist() == [[3, 4, *axis[5:]] for axis in ROTARY]
    rows.begin_steps(torch.tensor([1, 5]))
    assert rows._positions.of(torch.tensor([5, 9])).tolist() == [[5, 7]] * 3
    rows.select_rows(torch.tensor([0, 0, 1, 1]))
    assert rows._positions.of(torch.tensor([6, 6, 10, 10])).tolist() == [[6, 6, 8, 8]] * 3


def test_requests_with_one_offset_need_no_rows() -> None:
    rows = _rows()
    rows.set_step([_request("seen", 8, 1)], _outputs())
    assert rows._positions.of(torch.tensor([8])).tolist() == [[6]] * 3
    assert rows.features is None
    rows.set_step([_request("plain", 8, 2)], {})
    assert rows._positions.of(torch.tensor([8, 9])).tolist() == [[8, 9]] * 3


def test_plain_positions_stay_as_they_are() -> None:
    rows = _rows(num_axes=1)
    rows.set_step([_request("seen", 0, 5)], _outputs())
    assert rows._positions.of(torch.arange(5)).tolist() == [0, 1, 2, 3, 4]


def test_a_chunk_gets_its_part_of_the_features() -> None:
    rows = _rows()
    rows.set_step([_request("plain", 0, 2), _request("seen", 3, 5)], _outputs())
    assert rows.features is not None
    (part,), is_image = rows.features
    assert part.tolist() == [[2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
    assert is_image.tolist() == [False, False, True, True, True, False, False]


def test_features_from_elsewhere_are_refused() -> None:
    with pytest.raises(ViSpecError, match="no features of item image"):
        _rows().set_step([_request("seen", 0, 4)], {"image": torch.zeros(IMAGE_ROWS, 3)})


def test_a_reused_id_is_laid_out_anew() -> None:
    rows = _rows()
    rows.keep(["other"])
    with pytest.raises(KeyError):
        rows.set_step([_request("seen", 0, 4)], _outputs())

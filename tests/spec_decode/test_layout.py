"""Row ids against a slow, obvious re-statement of the reference's rules."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from vllm_vispec.spec_decode.layout import FeatureSlice, ImageRun, RequestLayout, build_layout
from vllm_vispec.spec_decode.step import RowIds, write_row_ids


@dataclass
class Position:
    ranges: list[tuple[int, int]]

    def extract_embeds_range(self) -> list[tuple[int, int]]:
        return self.ranges


@dataclass
class Feature:
    identifier: str
    mm_position: Position
    modality: str = field(default="image")


def feature(name: str, *ranges: tuple[int, int], modality: str = "image") -> Feature:
    return Feature(name, Position([(a, b - 1) for a, b in ranges]), modality)


def run_slots(layout: RequestLayout) -> dict[ImageRun, int]:
    return {run: slot for slot, run in enumerate(layout.runs, start=1)}


def expected_ids(layout: RequestLayout, ids: RowIds, length: int) -> np.ndarray:
    """Prompt token by prompt token, as docs/reference-semantics.md states it."""
    slots = run_slots(layout)
    out = np.full(length, ids.text(0), dtype=np.int32)
    current = 0
    for row in range(length):
        token = row + 1  # the row pairs with the next token
        inside = [run for run in layout.runs if run.begin <= token < run.end]
        if not inside:
            current = max((slots[r] for r in layout.runs if r.end <= token), default=0)
            out[row] = ids.text(current)
            continue
        from_end = inside[0].end - token  # 1 for the last image token
        token_index = ids.num_query_tokens - from_end  # 1-based, among the image's tokens
        is_compact = from_end <= ids.num_query_tokens - 1
        out[row] = ids.text(slots[inside[0]]) + token_index if is_compact else ids.masked
    return out


def all_ids(layout: RequestLayout, ids: RowIds, length: int, chunk_sizes: list[int]) -> np.ndarray:
    slots = run_slots(layout)
    parts, first_row = [], 0
    for size in chunk_sizes:
        out = np.empty(size, dtype=np.int32)
        write_row_ids(layout, ids, slots.get, first_row, out)
        parts.append(out)
        first_row += size
    return np.concatenate(parts)[:length]


@pytest.mark.parametrize("seed", range(60))
def test_ids_match_the_rules_however_the_prompt_is_cut(seed: int) -> None:
    rng = random.Random(seed)
    ids = RowIds(num_slots=9, num_query_tokens=rng.choice([1, 2, 3, 4]))
    features, cursor = [], rng.choice([0, 0, 1, 5])
    for index in range(rng.randint(0, 5)):
        end = cursor + rng.randint(1, 9)
        features.append(feature(str(index), (cursor, end)))
        cursor = end + rng.choice([0, 1, 2, 7])
    length = cursor + rng.randint(0, 6)
    layout = build_layout(features)
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(rng.randint(1, 7))
    expected = expected_ids(layout, ids, length)
    np.testing.assert_array_equal(all_ids(layout, ids, length, sizes), expected)


def test_images_that_touch_are_one_run() -> None:
    layout = build_layout([feature("a", (4, 8)), feature("b", (8, 10)), feature("c", (11, 13))])
    assert [(run.begin, run.end) for run in layout.runs] == [(4, 10), (11, 13)]
    assert layout.runs[0].parts == (FeatureSlice("a", 0, 4), FeatureSlice("b", 0, 2))


def test_the_first_embedding_is_lost_at_the_start_of_the_prompt() -> None:
    layout = build_layout([feature("a", (0, 4))])
    assert layout.runs[0].parts == (FeatureSlice("a", 1, 4),)
    assert layout.runs[0].first_row == 0
    assert build_layout([feature("a", (0, 1))]).runs == ()


def test_video_frames_are_runs_of_their_own_slices() -> None:
    layout = build_layout([feature("v", (3, 6), (8, 11), modality="video")])
    assert [run.parts for run in layout.runs] == [
        (FeatureSlice("v", 0, 3),),
        (FeatureSlice("v", 3, 6),),
    ]


def test_audio_is_left_to_the_text_path() -> None:
    assert build_layout([feature("a", (3, 6), modality="audio")]).runs == ()


def test_a_missing_image_is_masked_and_the_text_behind_has_none() -> None:
    ids = RowIds(num_slots=4, num_query_tokens=3)
    layout = build_layout([feature("a", (3, 8))])
    out = np.empty(10, dtype=np.int32)
    write_row_ids(layout, ids, lambda run: None, 0, out)
    np.testing.assert_array_equal(out[:2], ids.text(0))
    np.testing.assert_array_equal(out[2:7], ids.masked)
    np.testing.assert_array_equal(out[7:], ids.text(0))


def test_decode_rows_ask_only_for_the_last_image() -> None:
    layout = build_layout([feature(str(i), (10 * i + 1, 10 * i + 5)) for i in range(50)])
    asked: list[ImageRun] = []

    def slot_of(run: ImageRun) -> int:
        asked.append(run)
        return 1

    write_row_ids(layout, RowIds(4, 2), slot_of, 600, np.empty(5, dtype=np.int32))
    assert asked == [layout.runs[-1]]

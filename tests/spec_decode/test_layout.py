"""Row ids against a slow, obvious re-statement of the reference's rules."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_vispec.spec_decode.layout import FeatureSlice, ImageRun, RequestLayout, build_layout
from vllm_vispec.spec_decode.step import RowIds, write_row_ids


def feature(name: str, *ranges: tuple[int, int], modality: str = "image") -> Any:
    """Stands for vLLM's `MultiModalFeatureSpec`, whose ranges include their ends."""
    position = SimpleNamespace(extract_embeds_range=lambda: [(a, b - 1) for a, b in ranges])
    return SimpleNamespace(identifier=name, mm_position=position, modality=modality)


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


@pytest.mark.parametrize(
    ("features", "runs"),
    [
        pytest.param(
            [feature("a", (4, 8)), feature("b", (8, 10)), feature("c", (11, 13))],
            [
                (4, 10, FeatureSlice("a", 0, 4), FeatureSlice("b", 0, 2)),
                (11, 13, FeatureSlice("c", 0, 2)),
            ],
            id="touching images are one run",
        ),
        # The first embedding is lost at the start of the prompt.
        ([feature("a", (0, 4))], [(0, 4, FeatureSlice("a", 1, 4))]),
        ([feature("a", (0, 1))], []),
        pytest.param(
            [feature("v", (3, 6), (8, 11), modality="video")],
            [(3, 6, FeatureSlice("v", 0, 3)), (8, 11, FeatureSlice("v", 3, 6))],
            id="frames of a video",
        ),
        pytest.param(
            [feature("k", (2, 5), modality="vision_chunk")],
            [(2, 5, FeatureSlice("k", 0, 3))],
            id="an image of Kimi-K2.5",
        ),
        # Left to the text path.
        ([feature("a", (3, 6), modality="audio")], []),
    ],
)
def test_runs(features: list[Any], runs: list[tuple[Any, ...]]) -> None:
    layout = build_layout(features)
    assert [(run.begin, run.end, *run.parts) for run in layout.runs] == runs


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

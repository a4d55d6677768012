"""Texts of compressors, and the rows their tokens get inside an image."""

from __future__ import annotations

import time

import pytest

from vllm_vispec.compressors.places import num_tokens, place_tokens, wanted_rows
from vllm_vispec.compressors.spec import (
    COMBINATIONS,
    MAX_AMOUNT,
    PRIMITIVES,
    CompressorSpec,
    parse_compressor,
)
from vllm_vispec.utils.errors import ViSpecError

TEXTS = (
    "prune:2",
    "pool:20",
    "conv:3",
    "resampler:2",
    "resampler:10",
    "text_only",
    "identity",
    "weighted",
    "concat",
    "select",
    "select(prune:1,pool:1)",
    "concat(resampler:8,prune:2,resampler:4)",
)


@pytest.mark.parametrize("text", [*(name for name in PRIMITIVES), *TEXTS])
def test_text_is_read_back(text: str) -> None:
    spec = parse_compressor(text)
    assert parse_compressor(str(spec)) == spec
    assert parse_compressor(f"  {text} ") == spec


def test_numbers_left_out_are_the_defaults() -> None:
    assert parse_compressor("prune") == CompressorSpec("prune", PRIMITIVES["prune"].default)
    assert parse_compressor("query") == CompressorSpec("query")
    for name, entry in COMBINATIONS.items():
        assert str(parse_compressor(name)) == f"{name}({entry.default})"


def test_what_a_spec_says() -> None:
    assert [parse_compressor(name).gated for name in COMBINATIONS] == [False, True, True]
    assert not parse_compressor("prune:5").gated
    assert parse_compressor("query").is_query


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("", 'write it like "prune:20"'),
        ("mean", "use one of query, identity, prune, pool, conv, resampler, text_only, concat"),
        ("prune:0", f"from 1 to {MAX_AMOUNT}"),
        ("prune:", f"from 1 to {MAX_AMOUNT}"),
        (f"prune:{MAX_AMOUNT + 1}", f"from 1 to {MAX_AMOUNT}"),
        ("resampler:many", "the queries of resampler is a whole number"),
        ("text_only:2", "text_only takes no number"),
        ("prune(pool:2)", "prune has no branches"),
        ("select:3", "write the branches of select in parentheses"),
        ("select(prune:20)", "select needs at least two branches"),
        ("concat(query,prune:2)", "query cannot be a branch of concat"),
        ("concat(identity,prune:2)", "identity cannot be a branch of concat"),
        ("weighted(prune:2,pool:3)", "prune, pool or conv with one ratio"),
        ("weighted(prune:2,resampler:2)", "prune, pool or conv with one ratio"),
    ],
)
def test_unusable_text(text: str, remedy: str) -> None:
    with pytest.raises(ViSpecError) as error:
        parse_compressor(text)
    assert remedy in str(error.value)


def test_number_of_tokens() -> None:
    prune, queries = parse_compressor("prune:20"), parse_compressor("resampler:8")
    sizes = (0, 1, 19, 20, 39, 40, 577)
    assert [num_tokens(prune, size) for size in sizes] == [0, 1, 1, 1, 1, 2, 28]
    assert [num_tokens(queries, size) for size in (0, 1, 8, 100)] == [0, 8, 8, 8]
    assert [num_tokens(parse_compressor("text_only"), size) for size in (0, 1, 100)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("text", "size", "rows", "tokens"),
    [
        # A ratio's tokens stand in the middle of what they are made of, queries at the end.
        ("prune:20", 60, [9, 29, 49], [0, 1, 2]),
        ("pool:20", 5, [2], [0]),
        ("resampler:4", 30, [26, 27, 28, 29], [0, 1, 2, 3]),
        # The last queries stay in an image that is too small.
        ("resampler:4", 3, [0, 1, 2], [1, 2, 3]),
        # The short branch keeps its row, the long one loses a token.
        ("concat(prune:1,pool:2)", 2, [0, 1], [2, 0]),
        ("text_only", 49, [], []),
    ],
)
def test_where_tokens_stand(text: str, size: int, rows: list[int], tokens: list[int]) -> None:
    places = place_tokens(parse_compressor(text), size)
    assert (places.rows.tolist(), places.tokens.tolist()) == (rows, tokens)


CROWDED = ("concat(prune:2,pool:2,conv:3,prune:3)", "concat(resampler:4096,resampler:4096)")


@pytest.mark.parametrize("text", ["select", "prune:1", *CROWDED])
def test_big_images_take_no_time(text: str) -> None:
    place_tokens.cache_clear()
    begin = time.perf_counter()
    places = place_tokens(parse_compressor(text), 16_384)
    # Half a minute and more if every token looked at the rows around it one by one.
    assert time.perf_counter() - begin < 5.0
    assert len(places.rows) > 16_384 // 30


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 17, 20, 49, 64, 130])
@pytest.mark.parametrize("text", [*TEXTS, *CROWDED])
def test_tokens_take_the_nearest_free_row(text: str, size: int) -> None:
    """Short branches first; a token whose row is taken goes to the earlier of the two nearest."""
    spec = parse_compressor(text.replace("4096", "9"))
    counts = [num_tokens(branch, size) for branch in spec.primitives]
    taken: dict[int, tuple[int, int]] = {}
    for index in sorted(range(len(counts)), key=lambda i: counts[i]):
        for token, wanted in enumerate(wanted_rows(spec.primitives[index], size).tolist()):
            free = [row for row in range(size) if row not in taken]
            if wanted >= 0 and free:
                row = min(free, key=lambda row: (abs(row - wanted), row))
                taken[row] = (sum(counts[:index]) + token, index)
    places = place_tokens(spec, size)
    found = zip(places.tokens.tolist(), places.branches.tolist(), strict=True)
    assert dict(zip(places.rows.tolist(), found, strict=True)) == taken
    assert places.rows.tolist() == sorted(taken)

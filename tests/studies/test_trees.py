"""The grid, rows, losses and page of the evidence on trees, without engines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import turns
from benchmarks.calls import Measured, Memory
from benchmarks.report import publish
from benchmarks.trees import (
    CHAIN,
    DRAFT_VLM,
    LOADED,
    LONG,
    PARTS,
    TREE,
    VISPEC,
    Draft,
    Part,
    eagle2,
)
from benchmarks.trees.__main__ import Bench, measure_parts, with_earlier
from benchmarks.trees.results import Row, draw, find_losses, make_row, to_markdown
from benchmarks.turns import Job, memory_of, read_measured
from examples.tiny_vlm.families import FAMILIES
from tests.studies.made_up import made_up_call
from vllm_vispec.trees.attention import LayerPadding
from vllm_vispec.trees.codes import CodeBuffers

GREEDY, BATCHED = PARTS[Part.POLICIES][0], PARTS[Part.BATCH][0]
SAMPLED = PARTS[Part.TEMPERATURE][0]
CALLS = (made_up_call(5, 4.0), made_up_call(3, 4.0, ("charts",)))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A bench without a draft VLM."""
    heads = {VISPEC: "head"}
    return Bench(tmp_path / "work", "target", heads, per_family=2, per_batch_size=8, beside=2)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Names of the drafts that were started; all of them answer the same."""
    asked: list[list[str]] = []

    def side_by_side(
        plain: Job, drafts: Mapping[str, Job], *_: Any, **__: Any
    ) -> Iterator[tuple[str, Measured]]:
        assert plain.speculative is None
        asked.append([*drafts])
        for name in drafts:
            yield name, Measured(CALLS, Memory(25.0, 1.5))

    monkeypatch.setattr(turns, "side_by_side", side_by_side)
    return asked


# The grid


def test_names_tell_drafts_apart() -> None:
    drafts = {draft for _, drafts in PARTS.values() for draft in drafts}
    assert len({draft.name for draft in drafts}) == len(drafts)
    assert len({draft.label for draft in drafts}) == len(drafts)


@pytest.mark.parametrize("part", PARTS)
def test_every_tree_with_a_schedule_has_a_chain_as_deep_beside_it(part: Part) -> None:
    drafts = PARTS[part][1]
    chains = {draft.nodes for draft in drafts if draft.tree is None}
    assert {draft.levels for draft in drafts if draft.schedule} <= chains


def test_settings_reach_the_engine(bench: Bench) -> None:
    kwargs = bench.job(BATCHED, LOADED).llm_kwargs()
    assert kwargs["max_num_seqs"] == 16
    config = kwargs["speculative_config"]
    tree = {"policy": "spec_llava", "depth": 15, "top_k": 2, "threshold": 0.2}
    assert config["tree"] == tree
    assert config["num_speculative_tokens"] == 19
    assert "tree" not in bench.job(GREEDY, CHAIN).llm_kwargs()["speculative_config"]
    assert "speculative_config" not in bench.job(GREEDY, None).llm_kwargs()
    assert json.loads(json.dumps(kwargs)) == kwargs


def test_questions(bench: Bench) -> None:
    alone = bench.plan(GREEDY)
    assert sorted(samples for samples, _ in alone) == [(sample,) for sample in range(14)]
    assert [families[0] for _, families in alone[:7]] == list(FAMILIES)
    batched = [samples for samples, _ in bench.plan(BATCHED)]
    assert [len(call) for call in batched] == [1] * 8 + [2] * 4 + [4] * 2 + [8] + [16]
    assert all(len(set(call)) == len(call) for call in batched)
    most = bench.count_per_family(BATCHED) * len(FAMILIES)
    assert max(sample for call in batched for sample in call) < most
    assert set(bench.plan(BATCHED)[-1][1]) == set(FAMILIES)


# Measuring


def test_what_is_there_is_not_measured_again(bench: Bench, groups: list[list[str]]) -> None:
    bench.measure(GREEDY, [CHAIN, TREE])
    bench.measure(GREEDY, [CHAIN, TREE, Draft(3)])
    # The same draft under another condition is something else.
    bench.measure(SAMPLED, [CHAIN])
    assert groups == [[CHAIN.name, TREE.name], ["chain-K3"], [CHAIN.name]]
    stored = read_measured(bench.file(GREEDY, TREE))
    assert stored == Measured(CALLS, Memory(25.0, 1.5))


def test_a_draft_vlm_is_measured_if_there_is_one(bench: Bench, groups: list[list[str]]) -> None:
    measure_parts(bench, [Part.DRAFT_VLM], None)
    assert groups == [[]]
    with_vlm = replace(bench, heads={VISPEC: "head", DRAFT_VLM: "vlm"})
    measure_parts(with_vlm, [Part.DRAFT_VLM], None)
    drafts = PARTS[Part.DRAFT_VLM][1]
    assert groups[1] == [draft.name for draft in drafts]
    assert f"draft_vlm-{TREE.name}" in groups[1]
    assert (with_vlm.job(GREEDY, drafts[0]).speculative or {})["model"] == "vlm"


def test_unknown_drafts_are_named(bench: Bench) -> None:
    with pytest.raises(Exception, match="chain-K99"):
        measure_parts(bench, [Part.BATCH], ["chain-K99"])


def _loaded(*shapes: tuple[int, int, int], shared: bool = False) -> Any:
    """Return a worker whose layers are padded, by K, h and P; one shares its cache or none."""
    codes = CodeBuffers(4, 8, 8, torch.float32, torch.device("cpu"))
    layers: dict[str, Any] = {"vision": SimpleNamespace()}
    for number, shape in enumerate(shapes):
        layer = SimpleNamespace(num_heads=8, num_kv_heads=shape[0], head_size=shape[1])
        padding = LayerPadding(layer, shape[2], codes)
        layers[f"layer {number}"] = SimpleNamespace(
            impl=SimpleNamespace(tree_padding=padding),
            kv_sharing_target_layer_name="layer 0" if shared and number == 1 else None,
        )
    compilation = SimpleNamespace(static_forward_context=layers)
    return SimpleNamespace(vllm_config=SimpleNamespace(compilation_config=compilation))


def test_memory_comes_from_where_it_is_computed() -> None:
    memory = Memory(**memory_of(_loaded((2, 64, 96), (8, 72, 96))) or {})
    assert memory.kv_percent == pytest.approx(100 * (10 * 96 / (2 * 64 + 8 * 72) - 1))
    tables = 2 * 11 * 5 * 4
    rows = 8 * 96 * 4 * (2 * (8 + 2) + 2 * (8 + 8))
    assert memory.buffers_mib * 2**20 == rows + tables
    sharing = memory_of(_loaded((2, 64, 96), (8, 72, 96), shared=True))
    assert sharing is not None
    assert sharing["kv_percent"] == pytest.approx(50)
    assert memory_of(_loaded()) is None


# The report


def test_losses() -> None:
    def row(part: Part, draft: Draft, seconds: float, batch: int = 1) -> Row:
        calls = [made_up_call(3, seconds, ("captioning",) * batch)] * 2
        return make_row(part, draft, calls, None)

    rows = [
        row(Part.POLICIES, Draft(6), 4.8),
        row(Part.POLICIES, eagle2(5), 4.0),
        row(Part.POLICIES, eagle2(3), 6.0),
        *(row(Part.BATCH, LONG, 4.0, batch) for batch in (1, 2)),
        *(row(Part.BATCH, CHAIN, seconds, batch) for seconds, batch in ((6.0, 1), (3.2, 2))),
        *(row(Part.BATCH, TREE, seconds, batch) for seconds, batch in ((3.0, 1), (8.0, 2))),
        *(row(Part.BATCH, LOADED, seconds, batch) for seconds, batch in ((3.0, 1), (4.0, 2))),
    ]
    assert find_losses(rows) == [
        [eagle2(3).label, "chain, K = 6", "captioning 0.80", "0.80"],
        [TREE.label, CHAIN.label, "batch 2", "0.40"],
        [LOADED.label, CHAIN.label, "batch 2", "0.80"],
    ]


def test_report(bench: Bench, groups: list[list[str]], tmp_path: Path) -> None:
    page, output = tmp_path / "page.md", tmp_path / "found.json"

    def report() -> tuple[str, dict[str, Any]]:
        page.write_text("before\n<!-- tables: here -->\n<!-- /tables -->\nafter\n")
        found = with_earlier(output, bench.rows(), bench.settings())
        publish(output, page, found, to_markdown, draw)
        return page.read_text(), json.loads(output.read_text())

    # Of one draft, too.
    bench.measure(GREEDY, [CHAIN])
    assert "chain, K = 5" in report()[0]
    measure_parts(bench, list(PARTS), None)
    text, content = report()
    assert text.startswith("before")
    assert text.rstrip().endswith("after")
    for words in ("+25.0 %", "1.5 MiB", "arXiv 2509.11961", "| charts |", "2/2"):
        assert words in text
    vlm = {Part.DRAFT_VLM, Part.DRAFT_VLM_BATCH}
    assert {row["part"] for row in content["results"]} == set(Part) - vlm
    # Another run measures one part; the others stay.
    other = replace(bench, root=tmp_path / "other", per_family=1)
    measure_parts(other, [Part.SIBLING], None)
    kept = with_earlier(output, other.rows(), other.settings())
    parts = [row["part"] for row in kept["results"]]
    assert sorted(parts) == sorted(row["part"] for row in content["results"])
    assert parts[-1] == Part.SIBLING
    asked = {part: settings["per_family"] for part, settings in kept["settings"].items()}
    assert asked == {**dict.fromkeys(set(Part) - vlm, 2), Part.SIBLING: 1}
    assert content["results"][0]["acceptance_length"]["mean"] == 5
    # Samples in one call have no family of their own.
    both = make_row(Part.BATCH, TREE, [made_up_call(5, 4.0, ("charts", "captioning"))], None)
    assert both["by_family"] == {}
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

"""The grid, numbers, goals and page of the evidence on trees, without engines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from benchmarks import turns
from benchmarks.trees import measure as measuring
from benchmarks.trees.__main__ import measure_parts, report
from benchmarks.trees.grid import (
    BATCHES,
    CHAIN,
    DRAFT_VLM,
    LOADED,
    LOADED_PATH,
    PARTS,
    TREE,
    VISPEC,
    VLM_LOADED,
    VLM_LOADED_PATH,
    Draft,
    Part,
    Questions,
    eagle2,
)
from benchmarks.trees.measure import Bench, Measured, measure
from benchmarks.trees.results import find_goals, find_losses, make_row, read_rows
from benchmarks.turns import Memory, Reply, compare, take_turns
from benchmarks.turns_worker import memory_of
from examples.tiny_vlm.families import FAMILIES
from tests.studies.made_up_trees import FakeEngine, made_up_call, made_up_row, made_up_rows
from vllm_vispec.trees.attention import LayerPadding
from vllm_vispec.trees.codes import CodeBuffers
from vllm_vispec.utils.errors import ViSpecError

GREEDY, POLICIES = PARTS[Part.POLICIES]
BATCHED = PARTS[Part.BATCH][0]
SAMPLED = PARTS[Part.TEMPERATURE][0]
QUESTIONS = Questions(2, tuple(FAMILIES))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A bench without a draft VLM."""
    return Bench(tmp_path / "work", "target", {VISPEC: "head"}, QUESTIONS, beside=2)


# The grid


def test_every_tree_of_the_grid_is_valid() -> None:
    for _, drafts in PARTS.values():
        for draft in drafts:
            if draft.tree is not None:
                draft.tree.check_nodes(draft.nodes)


def test_a_tree_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ViSpecError, match="num_speculative_tokens=7"):
        eagle2(7, nodes=7)


def test_the_grid_has_what_the_evidence_asks_for() -> None:
    policies = POLICIES
    assert {draft.policy for draft in policies} == {"chain", "eagle2", "spec_llava", "entropy"}
    chains = {draft.nodes for draft in policies if draft.tree is None}
    assert {draft.levels for draft in policies if draft.tree is not None} <= chains
    trees = [draft for draft in PARTS[Part.NODES][1] if draft.tree]
    assert [draft.nodes for draft in trees] == [7, 15, 29, 59]
    # As the setting counts them.
    assert [f", {draft.nodes} nodes" in draft.label for draft in trees] == [True] * 4
    assert BATCHES == (1, 2, 4, 8, 16)
    assert SAMPLED.temperature == 1
    for part in (Part.DRAFT_VLM, Part.DRAFT_VLM_BATCH):
        assert {draft.head for draft in PARTS[part][1]} == {DRAFT_VLM}


def test_names_tell_drafts_apart() -> None:
    drafts = {draft for _, drafts in PARTS.values() for draft in drafts}
    assert len({draft.name for draft in drafts}) == len({draft.label for draft in drafts})
    assert len({draft.name for draft in drafts}) == len(drafts)


@pytest.mark.parametrize("loaded", [LOADED, LOADED_PATH, VLM_LOADED, VLM_LOADED_PATH])
def test_load_schedules_shrink_and_cover_every_batch(loaded: Draft) -> None:
    """Single paths from some batch on, beside a chain as deep under the same load."""
    assert loaded.tree is not None
    first, last, counts = zip(*loaded.schedule, strict=True)
    assert first == (1, *(size + 1 for size in last[:-1]))
    assert last[-1] == max(BATCHES)
    assert counts == tuple(sorted(counts, reverse=True))
    assert counts[0] == loaded.nodes
    assert counts[-1] <= loaded.tree.levels
    (part,) = [name for name, (_, drafts) in PARTS.items() if loaded in drafts]
    beside = {draft.nodes for draft in PARTS[part][1] if draft.tree is None}
    assert loaded.tree.levels in beside
    setting = loaded.speculative()["num_speculative_tokens_per_batch_size"]
    assert setting == [list(entry) for entry in loaded.schedule]


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


def test_questions() -> None:
    alone = QUESTIONS.calls(GREEDY)
    assert sorted(alone) == [(sample,) for sample in range(14)]
    assert [QUESTIONS.family(call[0], GREEDY) for call in alone[:7]] == list(FAMILIES)
    batched = QUESTIONS.calls(BATCHED)
    assert [len(call) for call in batched] == [1] * 8 + [2] * 4 + [4] * 2 + [8] + [16]
    assert all(len(set(call)) == len(call) for call in batched)
    samples = {sample for call in batched for sample in call}
    assert max(samples) < QUESTIONS.count_per_family(BATCHED) * len(FAMILIES)
    assert len({QUESTIONS.family(sample, BATCHED) for sample in batched[-1]}) == len(FAMILIES)


# Numbers


def test_numbers_of_calls() -> None:
    calls = [made_up_call(5, 4.0), made_up_call(3, 4.0)]
    assert turns.acceptance_length(calls) == 5
    assert turns.decode_speedup(calls) == 3
    # 2 s a step, 1 s a pass.
    assert turns.step_cost(calls) == 2
    assert turns.identical(calls) == (2, 2)
    assert turns.identical([replace(calls[0], identical=None)]) is None


def test_speedup_is_per_token_where_answers_differ() -> None:
    half = replace(made_up_call(5, 2.0), decoded=(6,), identical=None)
    assert turns.decode_speedup([half]) == 3


def test_a_batch_takes_as_many_steps_as_its_longest_answer() -> None:
    call = replace(made_up_call(5, 4.0, ("charts", "captioning")), accepted=((5,), (1, 1, 1, 1)))
    assert turns.step_cost([call]) == 1
    row = make_row(Part.BATCH, TREE, [call], None)
    assert row["by_family"] == {}


def test_answers_are_compared_where_they_must_be_equal() -> None:
    plain = Reply(((1, 2, 3), (4, 5)), ((), ()), 2.0, 3.0)
    mine = Reply(((1, 2, 3), (4, 6)), ((1,), (0,)), 1.0, 2.0)
    families = ("charts", "captioning")
    assert compare(families, plain, mine).identical == (True, False)
    assert compare(families, plain, mine, is_greedy=False).identical is None
    assert compare(families, plain, mine).decoded == (2, 1)


# Goals


def _met(goals: list[dict[str, Any]]) -> list[bool]:
    return [goal["met"] for goal in goals]


def test_goals_that_are_met() -> None:
    tokens, speedup, stretch, load = find_goals(made_up_rows())
    assert tokens["met"]
    assert tokens["value"] == 6 / 4
    assert "with every draft token accepted 1.75" in tokens["found"]
    assert not speedup["met"]  # 3.0 is not above 3.0
    assert speedup["value"] == stretch["value"] == 3
    assert load["met"]
    assert load["value"] == 1
    assert load["text"].endswith(LOADED.label)
    found = "batch 1: 1.33, batch 2: 1.00; over the fastest chain measured there: "
    assert load["found"] == found + "batch 1: 1.33, batch 2: 0.80"


def test_goals_that_are_missed() -> None:
    assert _met(find_goals(made_up_rows(loaded=4.1, tree_accepted=3))) == [False] * 4
    fast = [*made_up_rows(), made_up_row(Part.NODES, eagle2(5, nodes=15), 5, 3.8)]
    assert _met(find_goals(fast)) == [True, True, False, True]


def test_a_draft_vlm_is_compared_with_its_own_chain() -> None:
    rows = made_up_rows()
    chain, tree = Draft(6, head=DRAFT_VLM), eagle2(5, head=DRAFT_VLM)
    rows += [
        made_up_row(Part.DRAFT_VLM, chain, 1, 4.0),
        made_up_row(Part.DRAFT_VLM, tree, 4, 4.0),
    ]
    found = find_goals(rows)[1]
    assert found["text"].endswith("draft VLM")
    assert found["value"] == 5 / 2
    rows += [
        made_up_row(Part.DRAFT_VLM_BATCH, replace(chain, nodes=VLM_LOADED.levels), 1, 4.0),
        made_up_row(Part.DRAFT_VLM_BATCH, VLM_LOADED, 1, 3.2),
    ]
    found = find_goals(rows)[-1]
    assert found["text"].endswith(VLM_LOADED.label)
    assert found["value"] == pytest.approx(1.25)


def test_goals_need_numbers() -> None:
    assert find_goals([]) == []


def test_losses() -> None:
    lost = {(one["tree"], one["where"]): one["ratio"] for one in find_losses(made_up_rows())}
    assert lost == {
        (eagle2(3).label, "captioning 0.80"): pytest.approx(0.8),
        (TREE.label, "batch 2"): pytest.approx(0.4),
        (LOADED.label, "batch 2"): pytest.approx(0.8),
    }


# Measuring


def test_all_sides_are_asked_the_same() -> None:
    plain, *drafts = sides = [FakeEngine(name) for name in ("plain", "one", "two")]
    rows = list(take_turns(cast(Any, plain), cast(Any, drafts), QUESTIONS.plan(SAMPLED), 1.0))
    assert len(rows) == 14
    assert all(len(row) == 2 for row in rows)
    asked = [sorted(side.asked) for side in sides]
    assert asked[0] == asked[1] == asked[2]
    assert {temperature for _, temperature in asked[0]} == {1.0}


def _fake(groups: list[list[str]]) -> Any:
    def side_by_side(bench: Bench, condition: Any, drafts: Sequence[Draft]) -> Iterator[Measured]:
        groups.append([draft.name for draft in drafts])
        for _ in drafts:
            yield Measured(
                Memory(25.0, 1.5), (made_up_call(5, 4.0), made_up_call(3, 4.0, ("charts",)))
            )

    return side_by_side


def test_what_is_there_is_not_measured_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[str]] = []
    monkeypatch.setattr(measuring, "_side_by_side", _fake(groups))
    measure(bench, GREEDY, [CHAIN, TREE])
    measure(bench, GREEDY, [CHAIN, TREE, Draft(3), Draft(4), Draft(7)])
    assert groups == [[CHAIN.name, TREE.name], ["chain-K3", "chain-K4"], ["chain-K7"]]
    # The same drafts under another condition are something else.
    measure(bench, SAMPLED, [CHAIN])
    assert groups[-1] == [CHAIN.name]
    stored = Measured.read(bench.file(GREEDY, TREE))
    assert stored.memory == Memory(25.0, 1.5)
    assert stored.calls == (made_up_call(5, 4.0), made_up_call(3, 4.0, ("charts",)))


def test_a_draft_vlm_is_measured_if_there_is_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[list[str]] = []
    monkeypatch.setattr(measuring, "_side_by_side", _fake(groups))
    measure_parts(bench, [Part.DRAFT_VLM], ())
    assert groups == []
    with_vlm = replace(bench, heads={VISPEC: "head", DRAFT_VLM: "vlm"})
    measure_parts(with_vlm, [Part.DRAFT_VLM], ())
    names = [draft.name for draft in PARTS[Part.DRAFT_VLM][1]]
    assert [name for group in groups for name in group] == names
    assert f"draft_vlm-{TREE.name}" in names
    assert (with_vlm.job(GREEDY, PARTS[Part.DRAFT_VLM][1][0]).speculative or {})["model"] == "vlm"


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
    worker = _loaded((2, 64, 96), (8, 72, 96))
    memory = Memory(**memory_of(worker) or {})
    assert memory.kv_percent == pytest.approx(100 * (10 * 96 / (2 * 64 + 8 * 72) - 1))
    tables = 2 * 11 * 5 * 4
    rows = 8 * 96 * 4 * (2 * (8 + 2) + 2 * (8 + 8))
    assert memory.buffers_mib * 2**20 == rows + tables
    sharing = memory_of(_loaded((2, 64, 96), (8, 72, 96), shared=True))
    assert sharing is not None
    assert sharing["kv_percent"] == pytest.approx(50)
    assert memory_of(_loaded()) is None


# The report


def test_report(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_side_by_side", _fake([]))
    measure_parts(bench, list(PARTS), ())
    page, output = tmp_path / "page.md", tmp_path / "found.json"
    page.write_text("before\n<!-- tables: here -->\n<!-- /tables -->\nafter\n")
    report(bench, output, page)
    text = page.read_text()
    assert text.startswith("before")
    assert text.rstrip().endswith("after")
    for words in ("| goal |", "+25.0 %", "1.5 MiB", "arXiv 2509.11961", "| charts |", "2/2"):
        assert words in text
    content = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()
    assert len(content["results"]) == len(read_rows(bench))
    vlm = {Part.DRAFT_VLM, Part.DRAFT_VLM_BATCH}
    assert {row["part"] for row in content["results"]} == set(Part) - vlm
    assert content["results"][0]["acceptance_length"]["value"] == 5
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_one_part_is_a_report(bench: Bench, tmp_path: Path) -> None:
    file = bench.file(GREEDY, CHAIN)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(asdict(Measured(None, (made_up_call(5, 4.0),)))))
    page = tmp_path / "page.md"
    page.write_text("<!-- tables: here -->\n<!-- /tables -->\n")
    report(bench, tmp_path / "found.json", page)
    assert "chain, K = 5" in page.read_text()
    assert json.loads((tmp_path / "found.json").read_text())["goals"] == []

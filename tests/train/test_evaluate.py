"""`vispec eval` without an engine, on the shipped pair."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from examples.tiny_vlm.dataset import make_sample, strip_marks
from examples.tiny_vlm.shipped import HEAD, TARGET
from tests.support.heads import write_head
from tests.train.runs import write_records
from tests.train.samples import random_sample
from vllm_vispec.cli.evaluate import evaluate
from vllm_vispec.data.encode import Encoder
from vllm_vispec.data.template import load_processor
from vllm_vispec.evaluate.engine import EngineResult, questions
from vllm_vispec.evaluate.options import EvalOptions, read_samples
from vllm_vispec.evaluate.report import Report
from vllm_vispec.evaluate.run import _Pair, greedy_tokens
from vllm_vispec.train.acceptance import Acceptance


def record(folder: Path, family: str, index: int, answer: str | None = None) -> dict[str, Any]:
    """A held-out dialogue with its reference answers (or one answer to all) in LLaVA form."""
    sample = make_sample("heldout", 800_000 + index, family)
    turns = []
    for turn in sample.dialogue.turns:
        turns.append({"from": "human", "value": turn.question})
        turns.append({"from": "gpt", "value": answer or strip_marks(turn.answer)})
    content: dict[str, Any] = {"id": f"{family}-{index}", "family": family, "conversations": turns}
    if sample.canvas is not None:
        content["image"] = f"{family}-{index}.png"
        sample.canvas.image.save(folder / content["image"])
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return content


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    return write_records(folder / "data.jsonl", records)


def vispec_eval(data: Path, *arguments: str, head: str = HEAD) -> Result:
    app = typer.Typer()
    app.command()(evaluate)
    fixed = ["--target", TARGET, "--head", head, "--data", str(data), "--dtype", "float32"]
    return CliRunner().invoke(app, [*fixed, *arguments])


def numbers(data: Path, *arguments: str) -> dict[str, Any]:
    """The report of an evaluation."""
    output = data.parent / "new" / "numbers.json"
    found = vispec_eval(data, "--output", str(output), *arguments)
    assert found.exit_code == 0, found.output
    return {**json.loads(output.read_text()), "printed": found.output}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eval")


def test_a_file_becomes_a_table_and_json(folder: Path) -> None:
    records = [
        record(folder, "captioning", 0),
        record(folder, "multi_turn", 1),
        record(folder, "text_chat", 2),
        record(folder, "charts", 3) | {"image": "gone.png"},
    ]
    report = numbers(write(folder, records), "-k", "3", "--check-greedy")
    assert (report["samples"], report["num_speculative_tokens"]) == (3, 3)
    assert report["rejected"] == [{"id": "charts-3", "reason": "image gone.png does not exist"}]
    assert report["max_pixels"] == 196 * 196  # of the target's processor
    assert list(report["simulated"]) == ["captioning", "multi_turn", "text_chat", "overall"]
    overall = report["simulated"]["overall"]
    turns = len(make_sample("heldout", 800_001, "multi_turn").dialogue.turns)
    assert overall["answers"] == 2 + turns
    # What this head reaches on right answers; a row or a token out of place gives about 1.
    assert overall["acceptance_length"] > 2.5
    assert report["greedy_share"] > 0.8
    for text in ("captioning", "simulated", "3 conversations evaluated, 1 left out", "gone.png"):
        assert text in report["printed"]


def test_answers_that_are_not_the_targets_show_in_the_greedy_share(folder: Path) -> None:
    data = write(folder, [record(folder, "captioning", 4, answer="of of two red the small is a")])
    assert numbers(data, "--check-greedy")["greedy_share"] < 0.5


def test_batches_and_limits_do_not_change_the_numbers(folder: Path) -> None:
    data = write(folder, [record(folder, "captioning", i) for i in range(3)])
    one, both = (numbers(data, "--limit", "2", "--batch-size", size) for size in "18")
    assert one["simulated"] == both["simulated"]
    assert one["samples"] == both["samples"] == 2


def test_a_draft_vocabulary_changes_the_simulated_acceptance(folder: Path) -> None:
    data = write(folder, [record(folder, "captioning", 0)])
    (folder / "all.json").write_text(json.dumps(list(range(1024))))
    (folder / "half.json").write_text(json.dumps(list(range(0, 1024, 2))))
    flags = [[], ["--draft-vocab", f"{folder}/all.json"], ["--draft-vocab", f"{folder}/half.json"]]
    plain, same, fewer = (numbers(data, *one)["simulated"]["overall"] for one in flags)
    assert plain == same
    assert fewer["acceptance_length"] < plain["acceptance_length"]
    refused(vispec_eval(data, "--draft-vocab", "auto"), "has no draft_vocab.safetensors")


def test_the_dtype_is_the_targets_own(folder: Path) -> None:
    data = write(folder, [record(folder, "text_chat", 0)])
    assert numbers(data, "--dtype", "auto")["dtype"] == "bfloat16"


def test_questions_are_what_stands_before_each_answer(folder: Path) -> None:
    encoder = Encoder(load_processor(TARGET), 1024, folder)
    data = write(folder, [record(folder, "multi_turn", 6)])
    (sample,) = read_samples(data, encoder, [])
    found = list(questions(encoder, sample))
    assert len(found) == len(make_sample("heldout", 800_006, "multi_turn").dialogue.turns) > 1
    ids = sample.encoded.token_ids.tolist()
    ((start, end),) = sample.encoded.runs
    collapsed = ids[:start] + ids[end - 1 :]
    for question in found:
        assert question.images == ("multi_turn-6.png",)
        whole = question.prompt_ids + question.answer_ids
        assert collapsed[: len(whole)] == whole
    assert collapsed == found[-1].prompt_ids + found[-1].answer_ids


def refused(result: Result, text: str) -> None:
    assert result.exit_code == 1
    # Progress bars of loaders may stand before it.
    line = result.output.strip().splitlines()[-1]
    assert line.startswith("vispec: ")
    assert text in line


def test_bad_input_is_one_line(folder: Path) -> None:
    good = write(folder, [record(folder, "text_chat", 5)])
    refused(vispec_eval(folder / "none.jsonl"), "--data")
    refused(vispec_eval(good, "--limit", "0"), "--limit")
    refused(vispec_eval(good, "--dtype", "int8"), "--dtype")
    refused(vispec_eval(good, "-k", "0"), "num-speculative-tokens")
    refused(vispec_eval(good, "--max-length", "5"), "longer than max_length")
    refused(vispec_eval(good, "--output", str(good / "numbers.json")), "numbers.json cannot be")
    write_head(folder / "small")
    refused(vispec_eval(good, head=str(folder / "small")), "hidden_size")


def test_greedy_tokens_are_the_argmax_one_token_before() -> None:
    sample = random_sample(12, answers=[(0, 3), (6, 12)])
    lm_head = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    best = (sample.hidden_LD @ lm_head.T).argmax(-1)
    places = [1, 2, 6, 7, 8, 9, 10, 11]
    expected = sum(int(best[t - 1] == sample.token_ids[t]) for t in places)
    assert greedy_tokens(sample, lm_head) == (expected, len(places))
    sample.token_ids[1:] = best[:-1]
    assert greedy_tokens(sample, lm_head) == (len(places), len(places))


@pytest.mark.parametrize("by_engine", [True, False])
def test_a_head_that_hardly_accepts_is_named(folder: Path, by_engine: bool) -> None:
    options = EvalOptions(target=TARGET, head=HEAD, data=write(folder, []))
    for accepted, least, is_low in ((5, 1.2, True), (30, 1.2, False), (30, 1.4, True)):
        families = {"overall": Acceptance(100, 100 + accepted, 1, (accepted, 0))}
        measured = EngineResult(families, 1, 0) if by_engine else None
        report = Report(options, 1, (), families, engine=measured, break_even=least)
        said = f"warning: acceptance length {1 + accepted / 100:.2f} is so low"
        assert report.notes()[-1].startswith(said) == is_low


def test_what_a_head_must_accept_follows_from_its_size() -> None:
    """Of five draft passes and one of the target, by the weights that they read."""
    with torch.device("meta"):
        pair: Any = object.__new__(_Pair)
        pair.draft = torch.nn.ModuleDict(
            {
                "layer": torch.nn.Linear(10, 9, bias=False),
                "embed_tokens": torch.nn.Embedding(50, 10),
            }
        )
        language_model = torch.nn.Linear(30, 10, bias=False)
        pair.lm_head_VD = torch.empty(11, 10)
        pair.target = SimpleNamespace(
            lm_head_VD=torch.empty(20, 10),
            model=SimpleNamespace(model=SimpleNamespace(language_model=language_model)),
        )
    assert pair.break_even(5) == pytest.approx(1 + 5 * (90 + 110) / (300 + 200))
    assert pair.break_even(0) == 1.2

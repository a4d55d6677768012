"""`vispec eval` without an engine, on the shipped pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from examples.tiny_vlm.dataset import make_sample, strip_marks
from examples.tiny_vlm.shipped import HEAD, TARGET
from tests.support.heads import write_head
from tests.train.samples import random_sample
from vllm_vispec.cli.evaluate import evaluate
from vllm_vispec.data.encode import Encoder
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import Rejected
from vllm_vispec.evaluate.engine import questions
from vllm_vispec.evaluate.options import DataSource
from vllm_vispec.evaluate.run import greedy_tokens


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
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in records))
    return path


def vispec_eval(data: Path, *arguments: str, head: str = HEAD) -> Result:
    app = typer.Typer()
    app.command()(evaluate)
    fixed = ["--target", TARGET, "--head", head, "--data", str(data)]
    return CliRunner().invoke(app, [*fixed, *arguments])


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
    output = folder / "new" / "numbers.json"
    found = vispec_eval(
        write(folder, records), "-k", "3", "--check-greedy", "--output", str(output)
    )
    assert found.exit_code == 0, found.output
    numbers = json.loads(output.read_text())
    assert (numbers["samples"], numbers["num_speculative_tokens"]) == (3, 3)
    assert numbers["rejected"] == [{"id": "charts-3", "reason": "image gone.png does not exist"}]
    assert list(numbers["simulated"]) == ["captioning", "multi_turn", "text_chat", "overall"]
    overall = numbers["simulated"]["overall"]
    turns = len(make_sample("heldout", 800_001, "multi_turn").dialogue.turns)
    assert overall["answers"] == 2 + turns
    # What this head reaches on right answers; a row or a token out of place gives about 1.
    assert overall["acceptance_length"] > 2.5
    assert numbers["greedy_share"] > 0.8
    for text in ("captioning", "simulated", "3 conversations evaluated, 1 left out", "gone.png"):
        assert text in found.output


def test_answers_that_are_not_the_targets_show_in_the_greedy_share(folder: Path) -> None:
    data = write(folder, [record(folder, "captioning", 4, answer="of of two red the small is a")])
    output = folder / "numbers.json"
    assert vispec_eval(data, "--check-greedy", "--output", str(output)).exit_code == 0
    assert json.loads(output.read_text())["greedy_share"] < 0.5


def test_batches_and_limits_do_not_change_the_numbers(folder: Path) -> None:
    data = write(folder, [record(folder, "captioning", i) for i in range(3)])
    numbers = []
    for name, arguments in (("one", ["--batch-size", "1"]), ("all", ["--batch-size", "8"])):
        output = folder / f"{name}.json"
        found = vispec_eval(data, "--limit", "2", "--output", str(output), *arguments)
        assert found.exit_code == 0, found.output
        numbers.append(json.loads(output.read_text()))
    assert numbers[0] == numbers[1]
    assert numbers[0]["samples"] == 2


def test_a_draft_vocabulary_changes_the_simulated_acceptance(folder: Path) -> None:
    data = write(folder, [record(folder, "captioning", 0)])
    vocabulary = 1024
    (folder / "all.json").write_text(json.dumps(list(range(vocabulary))))
    (folder / "half.json").write_text(json.dumps(list(range(0, vocabulary, 2))))
    found = []
    for arguments in ([], ["all.json"], ["half.json"]):
        output = folder / "vocab.json"
        flags = ["--draft-vocab", str(folder / arguments[0])] if arguments else []
        assert vispec_eval(data, "--output", str(output), *flags).exit_code == 0
        found.append(json.loads(output.read_text())["simulated"]["overall"])
    assert found[0] == found[1]
    assert found[2]["acceptance_length"] < found[0]["acceptance_length"]
    refused(vispec_eval(data, "--draft-vocab", "auto"), "has no draft_vocab.safetensors")


def test_questions_are_what_stands_before_each_answer(folder: Path) -> None:
    data = DataSource(write(folder, [record(folder, "multi_turn", 6)]))
    encoder = Encoder(load_processor(TARGET), 1024, folder)
    rejected: list[Rejected] = []
    ((sample,),) = data.batches(encoder, 4, rejected)
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
    write_head(folder / "small")
    refused(vispec_eval(good, head=str(folder / "small")), "hidden_size")


def test_an_output_that_cannot_be_written_is_named(folder: Path) -> None:
    data = write(folder, [record(folder, "text_chat", 5)])
    refused(vispec_eval(data, "--output", str(data / "numbers.json")), "--output")


def test_greedy_tokens_are_the_argmax_one_token_before() -> None:
    sample = random_sample(12, answers=[(0, 3), (6, 12)])
    lm_head = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    best = (sample.hidden_LD @ lm_head.T).argmax(-1)
    places = [1, 2, 6, 7, 8, 9, 10, 11]
    expected = sum(int(best[t - 1] == sample.token_ids[t]) for t in places)
    assert greedy_tokens(sample, lm_head) == (expected, len(places))
    sample.token_ids[1:] = best[:-1]
    assert greedy_tokens(sample, lm_head) == (len(places), len(places))

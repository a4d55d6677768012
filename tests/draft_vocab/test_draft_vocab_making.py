"""The draft's own vocabulary: how it is made, the command that makes it, and its lm_head."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from examples.tiny_vlm.shipped import TARGET
from tests.support.heads import write_head
from vllm_vispec.cli.app import app
from vllm_vispec.draft_vocab.files import find_vocab
from vllm_vispec.draft_vocab.make import (
    answer_ids,
    count_tokens,
    coverage_by_size,
    rank_tokens,
)
from vllm_vispec.heads.folder import DRAFT_VOCAB_FACTS
from vllm_vispec.utils.errors import ViSpecError

RUNNER = CliRunner()


def test_ranking_special_first_then_frequent_then_by_id() -> None:
    counts = Counter({7: 5, 2: 9, 3: 5, 40: 1})
    assert rank_tokens(counts, [6, 4], 10) == [4, 6, 2, 3, 7, 0, 1, 5, 8, 9]


def test_coverage_of_answers_and_of_held_out_ones() -> None:
    counts = count_tokens([[1, 1, 2]] * 9 + [[1, 3, 3, 3]])
    assert counts.answers == 10
    found = coverage_by_size(counts, [0], vocab_size=4, size=3)
    # Token 3 is known from all answers, but not from the nine.
    assert found == {"3": {"all": pytest.approx(28 / 31), "held_out": pytest.approx(1 / 4)}}
    few = coverage_by_size(count_tokens([[1]]), [0], vocab_size=4, size=3)
    assert few == {"3": {"all": 1.0, "held_out": None}}


def test_recorded_tokens_come_before_the_text() -> None:
    from vllm_vispec.data.read import to_conversation

    record = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "two"},
        ],
        "response_token_ids": [[5, 6], None],
    }
    found = list(answer_ids(to_conversation(record, "a"), lambda text: [len(text)]))
    assert found == [[5, 6], [3]]


# The command

SIZE = 1024


def answers_file(path: Path, ids: list[list[int] | None]) -> Path:
    records = [
        {
            "id": str(number),
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "nowhere.png"}]},
                {"role": "assistant", "content": "the red circle"},
            ],
            "response_token_ids": [one],
        }
        for number, one in enumerate(ids)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run_vocab(head: Path, data: Path, *more: str) -> Any:
    arguments = ["vocab", "--target", TARGET, "--head", str(head), "--data", str(data)]
    return RUNNER.invoke(app, [*arguments, *more])


def test_vocab_writes_a_list_into_the_heads_folder(tmp_path: Path) -> None:
    head = tmp_path / "head"
    write_head(head, vocab_size=SIZE)
    data = answers_file(tmp_path / "answers.jsonl", [[20, 21, 20], [20, 22], None])
    result = run_vocab(head, data)
    assert result.exit_code == 0, result.output
    assert '"draft_vocab": "auto"' in result.output
    vocab = find_vocab("auto", head, SIZE)
    assert vocab is not None
    facts = json.loads((head / DRAFT_VOCAB_FACTS).read_text())
    special = facts["special_tokens"]
    assert special > 0
    assert vocab.token_ids[special] == 20
    assert sorted(vocab.token_ids) == list(range(SIZE))
    assert facts["answers"] == 3
    assert facts["coverage"][str(SIZE)]["all"] == 1.0
    assert facts["data"] == "answers.jsonl"
    again = run_vocab(head, data)
    assert again.exit_code == 1
    assert "add --overwrite" in again.stderr
    ends = json.loads(Path(TARGET, "generation_config.json").read_text())["eos_token_id"]
    assert set(ends if isinstance(ends, list) else [ends]) <= set(vocab.token_ids[:special])
    assert run_vocab(head, data, "--overwrite", "--size", "40").exit_code == 0
    smaller = find_vocab("auto", head, SIZE)
    assert smaller is not None
    assert smaller.token_ids == vocab.token_ids[:40]


@pytest.mark.parametrize(
    ("ids", "more", "said"),
    [
        ([[1024]], (), "token id 1024, the head's target has 0 to 1023"),
        ([[]], (), "has no answer to count"),
        ([[1]], ("--size", "1"), "--size is 1: give at least 2"),
        ([[1]], ("--size", "2"), "special tokens: use more"),
        ([[1]], ("--output", "nowhere"), "--output nowhere is no folder"),
        ([[1]], ("--target", "/nowhere"), "has no tokenizer that can be read"),
    ],
)
def test_vocab_ends_with_one_line(
    tmp_path: Path, ids: list[list[int] | None], more: tuple[str, ...], said: str
) -> None:
    head = tmp_path / "head"
    write_head(head, vocab_size=SIZE)
    result = run_vocab(head, answers_file(tmp_path / "a.jsonl", ids), *more)
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


# The lm_head


class Rank:
    """What `gather_rows` reads of an lm_head: rows `first` to `first + count`, then padding."""

    def __init__(self, weight: torch.Tensor, first: int, count: int, padding: int) -> None:
        self.weight = torch.cat([weight[first : first + count], torch.ones(padding, 3)])
        self.shard_indices = type(
            "Shard", (), {"org_vocab_start_index": first, "num_org_elements": count}
        )
        self.tp_size = 1


def test_rows_of_all_ranks_add_up_to_the_rows_asked_for() -> None:
    from vllm_vispec.draft_vocab.model import gather_rows

    weight = torch.randn(10, 3)
    ids = torch.tensor([0, 5, 6, 9])
    ranks: list[Any] = [Rank(weight, 0, 6, 2), Rank(weight, 6, 4, 4), Rank(weight, 10, 0, 8)]
    parts = [gather_rows(rank, ids) for rank in ranks]
    assert torch.equal(sum(parts, torch.zeros(4, 3)), weight[ids])


def test_scattered_logits_are_minus_infinity_elsewhere() -> None:
    from vllm_vispec.draft_vocab.model import scatter_logits

    logits = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    whole = scatter_logits(logits, torch.tensor([1, 3]), 5)
    assert whole[:, [1, 3]].equal(logits)
    assert whole[:, [0, 2, 4]].isneginf().all()


def test_a_quantized_lm_head_is_refused() -> None:
    from vllm_vispec.draft_vocab.model import _check_plain

    class Head:
        weight = torch.zeros(8, 4, dtype=torch.int8)
        quant_method = object()

    with pytest.raises(ViSpecError, match="is quantized"):
        _check_plain(Head(), 4)
    Head.weight = torch.zeros(8, 2)  # packed
    with pytest.raises(ViSpecError, match="leave draft_vocab out"):
        _check_plain(Head(), 4)
    Head.weight = torch.zeros(8, 4)
    _check_plain(Head(), 4)

"""Which samples are used and in what order; learning rates; files that appear whole."""

from __future__ import annotations

import json
import resource
import tracemalloc
from pathlib import Path

import pytest
import torch

from tests.support.tiny_store import TinyStore
from tests.train.runs import write_dialogues, write_records
from vllm_vispec.data.encode import Encoded
from vllm_vispec.data.template import load_processor
from vllm_vispec.train.checkpoint import Checkpoint, Checkpoints, Progress
from vllm_vispec.train.config import BatchConfig, DataConfig, ScheduleConfig
from vllm_vispec.train.data import (
    BatchOrder,
    Samples,
    count_reasons,
    describe_answers,
    read_corpus,
)
from vllm_vispec.train.trainer import rate_factor
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import writing

LENGTHS = {index: 10 + (index * 37) % 50 for index in range(50)}


def order(size: int, world: int = 1, seed: int = 0, pool: int = 3) -> BatchOrder:
    settings = BatchConfig(size=size, pool=pool)
    return BatchOrder(tuple(LENGTHS), LENGTHS, settings, world, seed)


def test_order_follows_from_seed_and_epoch() -> None:
    one = order(4)
    assert one.epoch(3) == order(4).epoch(3)
    assert one.epoch(3) not in (one.epoch(4), order(4, seed=1).epoch(3))
    assert one.steps_per_epoch == len(one.epoch(0)) == 13
    drawn = [index for step in one.epoch(0) for samples in step for index in samples]
    # Filled up to whole steps with samples of its own: everyone at least once, none three times.
    assert len(drawn) == 52
    assert {drawn.count(index) for index in LENGTHS} == {1, 2}
    few = BatchOrder((3, 7), LENGTHS, BatchConfig(size=4, accumulate=2), 1, 0)
    assert [[len(samples) for samples in step] for step in few.epoch(0)] == [[4, 4]]


@pytest.mark.parametrize(("world", "accumulate"), [(2, 4), (8, 1)])
def test_processes_share_what_one_would_see(world: int, accumulate: int) -> None:
    alone = BatchOrder(tuple(LENGTHS), LENGTHS, BatchConfig(size=2, accumulate=8), 1, 0)
    settings = BatchConfig(size=2, accumulate=accumulate)
    shared = BatchOrder(tuple(LENGTHS), LENGTHS, settings, world, 0)
    assert shared.epoch(1) == alone.epoch(1)
    for step in shared.epoch(1):
        parts = [shared.mine(step, rank) for rank in range(world)]
        assert [len(part) for part in parts] == [accumulate] * world
        assert sorted(batch for part in parts for batch in part) == sorted(step)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_are_filled_up_to_a_number_of_tokens(world: int) -> None:
    settings = BatchConfig(size=2, accumulate=8 // world, max_tokens=200)
    packed = BatchOrder(tuple(LENGTHS), LENGTHS, settings, world, 0)
    by_size = BatchOrder(tuple(LENGTHS), LENGTHS, BatchConfig(size=2, accumulate=8), 1, 0)
    for step, wanted in zip(packed.epoch(1), by_size.epoch(1), strict=True):
        assert sorted(i for b in step for i in b) == sorted(i for b in wanted for i in b)
        assert len(step) % world == 0
        assert len(step) < len(wanted)
        assert all(len(b) * max(LENGTHS[i] for i in b) <= 200 for b in step)


def test_batches_hold_like_lengths() -> None:
    def waste(pool: int) -> int:
        batches = [[LENGTHS[i] for i in step[0]] for step in order(5, pool=pool).epoch(0)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert waste(10) < waste(1) / 3


def test_held_out_samples(tmp_path: Path) -> None:
    data = write_dialogues(tmp_path, 20)
    corpus = read_corpus(DataConfig(train=(str(data),), validation_share=0.25))
    assert (len(corpus.train), len(corpus.validation)) == (15, 5)
    assert sorted(corpus.train + corpus.validation) == list(range(20))
    text = read_corpus(DataConfig(train=(str(data),), validation_share=0.25), text_only=True)
    assert (text.validation, text.digest) == (corpus.validation, corpus.digest)
    assert {len(text.entries[i].conversation.images) for i in text.train} == {0}
    (tmp_path / "more").mkdir()
    more = write_dialogues(tmp_path / "more", 9, seed=1)
    apart = read_corpus(DataConfig(train=(str(data),), validation=(str(more),), validation_max=4))
    assert (apart.train, apart.validation) == (tuple(range(20)), (20, 21, 22, 23))
    assert apart.entries[20].image_root == tmp_path / "more"
    assert apart.digest != corpus.digest
    # What is in both files is held out.
    both = write_records(
        tmp_path / "both.jsonl", [*map(json.loads, data.read_text().splitlines()[:3])]
    )
    left = read_corpus(DataConfig(train=(str(data),), validation=(str(both),)))
    assert (len(left.train), len(left.validation)) == (17, 3)
    assert "sample-1" not in {left.entries[n].conversation.sample_id for n in left.train}
    assert count_reasons(left.rejected)["in data.validation, too"]["count"] == 3


def test_greedy_answers_among_sampled_ones_are_held_out(tmp_path: Path) -> None:
    records = [json.loads(line) for line in write_dialogues(tmp_path, 20).read_text().splitlines()]

    def held_out(*greedy: int) -> tuple[tuple[int, ...], str]:
        for number, record in enumerate(records):
            record["temperature"] = 0 if number in greedy else 1.0
        data = write_records(tmp_path / "data.jsonl", records)
        corpus = read_corpus(DataConfig(train=(str(data),), validation_share=0.25))
        entries = [corpus.entries[index] for index in corpus.validation]
        assert sorted(corpus.train + corpus.validation) == list(range(20))
        return corpus.validation, describe_answers(entries)

    assert held_out(3, 8, 11) == ((3, 8, 11), "greedy answers")
    sampled, what = held_out()
    assert (len(sampled), what) == (5, "answers at temperature 1")
    assert len(held_out(*range(20))[0]) == 5
    for record in records:
        del record["temperature"]
    data = write_records(tmp_path / "data.jsonl", records)
    corpus = read_corpus(DataConfig(train=(str(data),)))
    assert describe_answers(corpus.entries) == "answers of unknown temperature"


def test_unreadable_records_are_counted(tmp_path: Path) -> None:
    good = json.loads(write_dialogues(tmp_path, 1).read_text())
    image = {"type": "image_url", "image_url": {"url": "gone.png"}}
    messages = [{"role": "user", "content": [image]}, good["messages"][1]]
    lost = {**good, "id": "lost", "messages": messages}
    data = write_records(tmp_path / "mixed.jsonl", [good, lost, {"id": "empty"}])
    counted = count_reasons(read_corpus(DataConfig(train=(str(data),))).rejected)
    assert {name: one["count"] for name, one in counted.items()} == {
        "missing image": 1,
        "unusable record": 1,
    }
    assert "lost: image gone.png does not exist" in counted["missing image"]["examples"]


def test_recorded_tokens_take_little_memory(tiny: TinyStore, tmp_path: Path) -> None:
    records = [json.loads(line) for line in write_dialogues(tmp_path, 200).read_text().splitlines()]
    for number, one in enumerate(records):
        one["response_token_ids"] = [[300 + (number * 7 + n) % 700 for n in range(1000)]]
    data = write_records(tmp_path / "answers.jsonl", records)
    tracemalloc.start()
    corpus = read_corpus(DataConfig(train=(str(data),)))
    assert tracemalloc.get_traced_memory()[0] < 2e6  # 7 MB as lists
    tracemalloc.stop()
    samples = Samples(corpus, load_processor(tiny.target("llava")), torch.float32)
    found = samples.encode(3)
    assert isinstance(found, Encoded)
    assert found.token_ids[found.answer].tolist() == records[3]["response_token_ids"][0]
    assert len({samples.key(index) for index in range(9)}) == 9


def test_learning_rate() -> None:
    linear = ScheduleConfig(warmup=0.1, decay="linear", floor=0.2)
    rates = [rate_factor(linear, progress) for progress in (0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.5, 1.0, 0.6, 0.2])
    cosine = ScheduleConfig(warmup=0.0, decay="cosine", floor=0.0)
    assert [rate_factor(cosine, x) for x in (0.0, 0.5)] == pytest.approx([1.0, 0.5])
    assert rate_factor(ScheduleConfig(warmup=0.0, decay="constant"), 0.9) == pytest.approx(1.0)


def checkpoint(step: int, value: float, best: int | None = None) -> Checkpoint:
    tensors = {"weights": {"a": torch.full((200_000,), value)}}
    return Checkpoint(Progress(step=step, best_step=best), {"x.y": 1}, tensors)


def test_checkpoints_keep_the_newest_and_the_best(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4, 5):
        saved.save(checkpoint(step, float(step), best=2 if step > 1 else None))
    assert saved.steps() == [2, 4, 5]
    loaded = saved.load(5)
    assert loaded.progress == Progress(step=5, best_step=2)
    assert float(loaded.groups["weights"]["a"][7]) == 5.0
    saved.save(checkpoint(5, 6.0))
    assert float(saved.load(5).groups["weights"]["a"][0]) == 6.0


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, keep=2)
    saved.save(checkpoint(1, 1.0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ViSpecError, match="cannot be written") as caught:
            saved.save(checkpoint(2, 2.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert float(saved.load(1).groups["weights"]["a"][0]) == 1.0


def test_two_containers_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their processes have the same number."""
    monkeypatch.setattr("os.getpid", lambda: 7)
    with writing(tmp_path / "shard") as one, writing(tmp_path / "shard") as other:
        one.write_text("same")
        other.write_text("same")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("shard", "same")]


def test_damaged_checkpoints(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, keep=2)
    saved.save(checkpoint(1, 1.0))
    folder = tmp_path / "step-00000001"
    weights = folder / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ViSpecError, match="cannot be read"):
        saved.load(1)
    for text, message in (('{"format": 9}', "has format 9"), ("{", "cannot be read")):
        (folder / "state.json").write_text(text)
        with pytest.raises(ViSpecError, match=message):
            saved.load(1)

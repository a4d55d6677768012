"""What is refused before samples are encoded or the target is loaded, and what a dry run says."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner

from tests.support.heads import write_head
from tests.support.tiny_families import HIDDEN
from tests.support.tiny_store import TinyStore
from tests.train.runs import recipe, run, write_dialogues, write_records
from tests.train.test_processes import arguments
from vllm_vispec.cli.app import app
from vllm_vispec.reference import draft_class
from vllm_vispec.train import cache, dry_run, loop
from vllm_vispec.train.config import config_from_flat, load_config
from vllm_vispec.train.distributed import processes
from vllm_vispec.train.init import new_head_config
from vllm_vispec.train.preflight import prepare, with_batch, without_tables
from vllm_vispec.train.target import TrainingTarget
from vllm_vispec.utils.errors import ViSpecError

GIB = 2**30


@pytest.fixture
def nothing_expensive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither encoding nor loading the target."""
    for module in (cache, loop):
        monkeypatch.setattr(
            module, "open_teacher", lambda *_, **__: pytest.fail("samples are encoded")
        )
    monkeypatch.setattr(TrainingTarget, "load", lambda *_: pytest.fail("the target is loaded"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head__init_from": "out/stage1/head"}, r"out/stage1/head' does not exist: train that"),
        ({"loss__name": "vispek"}, "loss.name is 'vispek': use one of auto, vispec"),
        ({"loss__weights": {"k1": 1.0}}, "loss term 'k1' is unknown"),
        (
            {"head__init_from": "HEAD", "head__num_query_tokens": 3},
            "num_query_tokens is 3, head.*2",
        ),
        ({"batch__global_size": 6}, "6 is no multiple of batch.size 4 x 1 processes: .* to 4 "),
        ({"batch__global_size": 8, "batch__accumulate": 3}, "contradicts .* which needs 2"),
        ({"target__model": "EMPTY"}, r"holds no \*.safetensors"),
        ({"data__train": "none.jsonl"}, "data.train .*none.jsonl is no file: give one"),
        (
            {"data__image_root": "elsewhere", "data__train": "IMAGES"},
            r"none of 1 records .*\(first: a: image 1-0.png does not exist\): .*data.image_root",
        ),
        ({"data__train": "OTHER"}, r"sample a has token 4096, target.model .* another model's"),
        ({"head__kind": "eagle_text", "data__train": "PICTURES"}, "on samples without images, add"),
        (
            {"target__attention": "flash_attention_2"},
            "needs the package flash-attn and a GPU: inst",
        ),
        ({"run__output": "FILE/out"}, "is a file; choose another folder"),
    ],
)
@pytest.mark.usefixtures("nothing_expensive")
def test_bad_input_is_one_line_before_the_expensive_part(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    target = tiny.target("qwen2_5_vl")
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "vocab_size": 1024, "head_dim": HIDDEN // 4}
    write_head(tmp_path / "HEAD", num_query_tokens=2, **sizes)
    (tmp_path / "EMPTY").mkdir()
    shutil.copy(target / "config.json", tmp_path / "EMPTY")
    (tmp_path / "FILE").write_text("")
    record: dict[str, Any] = {
        "id": "a",
        "image": "1-0.png",
        "conversations": [{"from": "human", "value": "What?"}],
    }
    write_records(tmp_path / "IMAGES", [record])
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Yes"}]
    record = {"id": "a", "messages": turns, "response_token_ids": [[9, 4096]]}
    write_records(tmp_path / "OTHER", [record])
    pictures = [line for line in dialogues.open() if "image_url" in line]
    text = "".join(pictures).replace('"url": "', f'"url": "{dialogues.parent}/')
    (tmp_path / "PICTURES").write_text(text)
    named = {
        name: re.sub(
            "HEAD|EMPTY|FILE|IMAGES|OTHER|PICTURES", lambda found: str(tmp_path / found[0]), value
        )
        if isinstance(value, str)
        else value
        for name, value in changes.items()
    }
    settings = {"run__output": str(tmp_path / "run")} | named
    flat = recipe(target, dialogues, tmp_path / "run").flat()
    flat |= {name.replace("__", ".", 1): value for name, value in settings.items()}
    with pytest.raises(ViSpecError, match=said) as error:
        run(config_from_flat(flat))
    assert "\n" not in str(error.value)
    assert "speculative-config" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_settings_are_checked_before_a_data_set_is_fetched(tmp_path: Path) -> None:
    for name, value in (("loss.name", "eagel"), ("loss.weights", {"k1": 1}), ("run.trackers", "x")):
        flat = recipe("hf/none", tmp_path, tmp_path / "run").flat()
        with pytest.raises(ViSpecError, match=r"eagel|k1|run\.trackers 'x'"):
            without_tables(config_from_flat(flat | {"data.train": "hf://a/b", name: value}))


class _Usage(NamedTuple):
    free: int


@pytest.mark.usefixtures("nothing_expensive")
def test_a_full_disk(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage(1000))
    with pytest.raises(ViSpecError, match="GB for checkpoints, 1e-06 GB are free: free space"):
        run(recipe(tiny.target("qwen2_5_vl"), dialogues, tmp_path / "run"))


def test_a_global_batch_is_shared_by_the_processes() -> None:
    config = config_from_flat({"batch.size": 1, "batch.global_size": 8})
    assert [with_batch(config, world).batch.accumulate for world in (1, 2, 8)] == [8, 4, 1]
    with pytest.raises(ViSpecError, match=r"is no multiple of batch.size 1 x 16 .* to 16 \(and sc"):
        with_batch(config, 16)


@pytest.mark.usefixtures("nothing_expensive")
def test_a_dry_run_says_what_it_will_cost(tiny: TinyStore, dialogues: Path, tmp_path: Path) -> None:
    config = recipe(tiny.target("qwen2_5_vl"), dialogues, tmp_path / "run", data__max_length=60)
    names = ("target.model", "data.train", "data.max_length", "batch.size", "run.output")
    flat = config.flat() | {"data.train": str(dialogues)}
    words = [word for name in names for word in ("--set", f"{name}={flat[name]}")]
    done = CliRunner().invoke(app, ["train", "--dry-run", *words, "--set", "schedule.epochs=2"])
    assert done.exit_code == 0, done.output
    found = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert list(found) == [
        "target", "head", "images", "samples", "tokens", "steps", "memory", "disk"
    ]  # fmt: skip
    assert "longer than data.max_length" in found["samples"]
    assert re.search(r"an epoch of 4 samples .* \d+ in all", found["steps"])
    assert not (tmp_path / "run").exists()


def test_a_dry_run_can_take_steps(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On no more samples than these need, and no tracker hears of them."""
    observe, seen = TrainingTarget.observe, []

    def count(target: TrainingTarget, samples: Any) -> Any:
        seen.extend(samples)
        return observe(target, samples)

    monkeypatch.setattr(TrainingTarget, "observe", count)
    monkeypatch.setattr(dry_run, "TIMED_STEPS", 2)
    monkeypatch.setattr(dry_run, "WARM_STEPS", 1)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    more = write_dialogues(Path(shutil.copytree(dialogues.parent, tmp_path / "more")), 9, seed=1)
    config = recipe(tiny.target("qwen2_5_vl"), dialogues, tmp_path / "out" / "run",
                    data__validation=str(more), run__trackers="wandb", teacher__mode="offline",
                    batch__size=1, batch__global_size=4)  # fmt: skip
    with processes("cpu") as group:
        text = dry_run.dry_run(config, group, timed=True)
    assert re.search(r"time +\S+ s a step \(2 steps timed\), \S+ hours in all", text)
    assert len(seen) == 3 * 4
    assert [path.name for path in tmp_path.iterdir()] == ["more"]


def test_a_dry_run_of_a_ray_job_counts_its_workers(
    tiny: TinyStore, dialogues: Path, tmp_path: Path
) -> None:
    config = recipe(tiny.target("qwen2_5_vl"), dialogues, tmp_path / "run", batch__global_size=16)
    command = ["train", "--dry-run", "--ray", *arguments(config), "--workers"]
    assert "x 2 processes" in CliRunner().invoke(app, [*command, "2"]).output
    assert (
        "no multiple of batch.size 4 x 3 processes"
        in CliRunner().invoke(app, [*command, "3"]).output
    )
    assert "leave out --ray" in CliRunner().invoke(app, [*command, "2", "--time"]).output


# (batch, tokens, answer's tokens, passes, chunk_rows) -> GiB of draft gradients, its copies in
# bfloat16 and the step, which FakeTensor counted for Qwen2.5-VL-7B.
COUNTED = {
    (1, 2400, 1024, 2, 2048): 8.7,
    (1, 2400, 1024, 6, 2048): 17.4,
    (1, 4096, 4056, 2, 2048): 12.5,
    (1, 8192, 8152, 2, 2048): 28.5,
    (4, 2400, 1024, 2, 2048): 14.5,
    (8, 2400, 1024, 2, 512): 17.4,
    (8, 4096, 4056, 2, 2048): 58.0,
}


class SevenB:
    """The text model of Qwen2.5-VL-7B."""

    hidden_size, intermediate_size, num_attention_heads = 3584, 18944, 28
    vocab_size, max_position_embeddings, rms_norm_eps = 152064, 128000, 1e-6
    rope_theta = 1e6


def large_draft() -> Any:
    head = new_head_config("vispec", SevenB, target_model_type="qwen2_5_vl")
    with torch.device("meta"):
        return draft_class(head)(head)


@pytest.mark.parametrize("name", ["stage1_text", "stage2_vision", "vision"])
def test_the_recipes_fit_a_gpu_of_40_gib(name: str) -> None:
    """At the longest sample that they allow, all of it an answer, beside the whole target."""
    config = load_config(f"examples/recipes/{name}.yaml")
    longest = config.data.max_length
    cost = dry_run.memory(config, large_draft(), round(8.3e9 * 2), longest, longest)
    assert 20 * GIB < cost.total <= 40 * GIB


@pytest.mark.parametrize("case", COUNTED)
def test_the_estimated_memory_is_that_of_fake_tensors(case: tuple[int, int, int, int, int]) -> None:
    draft = large_draft()
    batch, tokens, answers, passes, chunk = case
    config = config_from_flat(
        {"batch.size": batch, "loss.passes": passes, "loss.chunk_rows": chunk}
    )
    cost = dry_run.memory(config, draft, 0, tokens, answers)
    fits = cost.total <= 40 * GIB
    assert ("lower batch.size" in dry_run._memory(config, cost, 0, 40 * GIB)) != fits
    counted_with = cost.step + cost.draft * 6 // 18
    assert counted_with / GIB == pytest.approx(COUNTED[case], rel=0.2)


def test_the_recipes_pass_every_check(tiny: TinyStore, dialogues: Path, tmp_path: Path) -> None:
    """Those of large targets, on a small one and without the head of an earlier stage."""
    for file in sorted(Path("examples/recipes").glob("*.yaml")):
        changes = {"target.model": tiny.target("qwen2_5_vl"), "data.train": dialogues}
        words = [f"{name}={value}" for name, value in changes.items()]
        words += ["data.validation=", "head.init_from=", f"run.output={tmp_path}"]
        words += ["head.trained=all"] if load_config(file).head.kind == "draft_vlm" else []
        assert prepare(load_config(file, words), 1)[1].train, file

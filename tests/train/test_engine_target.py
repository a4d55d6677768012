"""A target that vLLM runs for the offline cache: the same states, then no engine any more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.child import run_in_subprocess
from tests.support.engine import IN_PROCESS_ENV, shut_down_distributed
from tests.support.quantised import quantise
from tests.support.tiny_store import TinyStore
from tests.train.runs import recipe, run
from vllm_vispec.train.cache import OfflineTeacher
from vllm_vispec.train.config import TrainConfig, config_from_flat
from vllm_vispec.train.distributed import Processes, processes
from vllm_vispec.train.engine_target import EngineTarget
from vllm_vispec.train.loop import fill_cache
from vllm_vispec.train.preflight import prepare
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import read_json

# Prompts are prefilled in parts.
OPTIONS = {"enforce_eager": True, "max_num_batched_tokens": 48, "gpu_memory_utilization": 0.1}
TWO_WORKERS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def fill(flat: dict[str, Any]) -> str:
    """Complete a cache in this process."""
    with processes("cpu") as group:
        message = fill_cache(config_from_flat(flat), group)
    shut_down_distributed()
    return message


def stored(folder: Path) -> dict[str, Tensor]:
    """Tensors of every sample of a cache, by key, and its tables."""
    found = {}
    for file in folder.glob("*/*/shard-*.json"):
        with safe_open(str(file.with_suffix(".safetensors")), framework="pt") as shard:
            for number, record in enumerate(read_json(file)):
                for name in ("token_ids", "answer", "hidden", "rows", "embeds"):
                    found[f"{record['key']}.{name}"] = shard.get_tensor(f"{number}.{name}")
    (tables,) = folder.glob("*/*/tables.safetensors")
    return found | load_file(tables)


def fill_both(wanted: TrainConfig, by_engine: TrainConfig) -> tuple[dict[str, Tensor], ...]:
    """Complete a cache with transformers and one with vLLM; return what is in them."""
    fill(wanted.flat())
    (said,) = run_in_subprocess(
        "tests.train.test_engine_target:fill", {"flat": by_engine.flat()}, IN_PROCESS_ENV
    )
    assert "24 samples, 0 skipped" in said
    found = [stored(Path(one.teacher.cache_dir)) for one in (wanted, by_engine)]
    assert set(found[0]) == set(found[1])
    return tuple(found)


SLOW = [
    pytest.param(kind, options, marks=pytest.mark.slow, id=name)
    for name, kind, options in (
        ("llava_next", "llava_next", OPTIONS),
        ("qwen3_vl", "qwen3_vl", OPTIONS),
        ("tensor parallel", "qwen2_5_vl", {**OPTIONS, **TWO_WORKERS}),
    )
]


@pytest.mark.engine
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kind", "options"), [pytest.param("qwen2_5_vl", OPTIONS, id="qwen2_5_vl"), *SLOW]
)
def test_states_are_those_of_transformers(
    tiny: TinyStore,
    dialogues: Path,
    tmp_path: Path,
    kind: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configs = [
        recipe(tiny.target(kind), dialogues, tmp_path / "run", teacher__mode="offline",
               teacher__cache_dir=str(tmp_path / engine), teacher__engine=engine, batch__size=1,
               teacher__engine_options=options, schedule__max_steps=2)
        for engine in ("transformers", "vllm")
    ]  # fmt: skip
    wanted, found = fill_both(*configs)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-3)
    # Training needs no engine.
    monkeypatch.setattr(EngineTarget, "start", lambda *_: pytest.fail("the engine is started"))
    assert run(configs[1]).finished


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_states_of_a_quantised_target(tiny: TinyStore, dialogues: Path, tmp_path: Path) -> None:
    """Weights and inputs of its decoder layers are int8; everything else is as it was."""
    whole = Path(tiny.target("qwen2_5_vl"))
    folders = {"transformers": whole, "vllm": quantise(whole, tmp_path / "quantised")}
    wanted, found = fill_both(*(
        recipe(folder, dialogues, tmp_path / "run", teacher__mode="offline",
               teacher__cache_dir=str(tmp_path / engine), teacher__engine=engine, batch__size=1,
               teacher__engine_options=OPTIONS, target__dtype="bfloat16")
        for engine, folder in folders.items()
    ))  # fmt: skip
    hidden = [name for name in wanted if name.endswith("hidden")]
    for name in wanted.keys() - hidden:
        torch.testing.assert_close(found[name], wanted[name])
    likeness = [F.cosine_similarity(found[x].float(), wanted[x].float()).min() for x in hidden]
    assert 0.9 < float(min(likeness)) < 0.9999


def test_what_cannot_be_stored_by_an_engine(
    tiny: TinyStore, dialogues: Path, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(tiny.target("qwen2_5_vl"), tmp_path / "target"))
    settings: dict[str, Any] = {"teacher__engine": "vllm", "teacher__mode": "offline"}
    config = recipe(target, dialogues, tmp_path / "run", **settings)
    with pytest.raises(ViSpecError, match=r"set teacher\.mode to offline"):
        run(recipe(target, dialogues, tmp_path / "run", teacher__engine="vllm"))
    file = target / "config.json"
    how = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 16}}
    file.write_text(json.dumps(read_json(file) | how))
    weights = load_file(target / "model.safetensors")
    name = next(name for name in weights if "visual" in name and name.endswith("proj.weight"))
    save_file({**weights, f"{name}_scale": torch.ones(1)}, target / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    with pytest.raises(ViSpecError, match=r"quantised outside its decoder layers \(.*_scale\)"):
        run(config)
    prepared, corpus = prepare(config, 2)
    with pytest.raises(ViSpecError, match=r"24 samples have no states yet.* --cache-only"):
        OfflineTeacher(prepared, corpus, _Alone(1, 2, torch.device("cpu")))


class _Alone(Processes):
    """One of several processes that waits for no other."""

    def wait(self) -> None:
        return None

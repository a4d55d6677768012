"""A target that vLLM runs for the offline cache: the same states, then no engine any more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.child import run_in_subprocess
from tests.support.engine import IN_PROCESS_ENV, shut_down_distributed
from tests.support.tiny_store import TinyStore
from tests.train.runs import recipe, run
from vllm_vispec.train.cache import OfflineTeacher
from vllm_vispec.train.config import config_from_flat
from vllm_vispec.train.distributed import Processes, processes
from vllm_vispec.train.engine_target import EngineTarget
from vllm_vispec.train.loop import fill_cache
from vllm_vispec.train.preflight import prepare
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import read_json

# Prompts are prefilled in parts.
OPTIONS = {"enforce_eager": True, "max_num_batched_tokens": 48, "gpu_memory_utilization": 0.1}


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


@pytest.mark.engine
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "kind",
    ["qwen2_5_vl", *(pytest.param(x, marks=pytest.mark.slow) for x in ("llava_next", "qwen3_vl"))],
)
def test_states_are_those_of_transformers(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = {"transformers": tmp_path / "one", "vllm": tmp_path / "two"}
    configs = {
        engine: recipe(tiny.target(kind), dialogues, tmp_path / "run", teacher__mode="offline",
                       teacher__cache_dir=str(cache), teacher__engine=engine, batch__size=1,
                       teacher__engine_options=OPTIONS, schedule__max_steps=2)
        for engine, cache in caches.items()
    }  # fmt: skip
    fill(configs["transformers"].flat())
    (said,) = run_in_subprocess(
        "tests.train.test_engine_target:fill", {"flat": configs["vllm"].flat()}, IN_PROCESS_ENV
    )
    assert "24 samples, 0 skipped" in said
    wanted, found = (stored(cache) for cache in caches.values())
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-3)
    # Training needs no engine.
    monkeypatch.setattr(EngineTarget, "start", lambda *_: pytest.fail("the engine is started"))
    assert run(configs["vllm"]).finished


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

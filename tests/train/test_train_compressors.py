"""Training of heads with a compressor on a tiny target: all of them, reproducible, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_store import TinyStore
from tests.train.runs import lines, losses, recipe, run
from vllm_vispec.heads.folder import inspect_head, load_draft
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.utils.errors import ViSpecError

SELECT = "select(prune:3,conv:2,resampler:2,text_only)"
BRANCHES = {"prune:3", "conv:2", "resampler:2", "text_only"}
COMPRESSORS = (
    "prune:3",
    "pool:3",
    "conv:3",
    "resampler:2",
    "text_only",
    "concat(prune:4,pool:4,conv:2,resampler:2)",
    "weighted(prune:2,pool:2,conv:2)",
    SELECT,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("states"))


def cached(tiny: TinyStore, data: Path, output: Path, cache: str, **changes: Any) -> TrainConfig:
    settings = {"head__kind": "specvlm", "run__threads": 1, "optimizer__clip": "norm",
                "teacher__mode": "offline", "teacher__cache_dir": cache, **changes}  # fmt: skip
    return recipe(tiny.target("qwen2_5_vl"), data, output, **settings)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_every_compressor_learns_and_is_exported(
    compressor: str, tiny: TinyStore, dialogues: Path, tmp_path: Path, cache: str
) -> None:
    config = cached(tiny, dialogues, tmp_path / "run", cache, head__compressor=compressor,
                    schedule__max_steps=12, optimizer__lr=3e-3, schedule__warmup=0.0)  # fmt: skip
    assert run(config).finished
    found = list(losses(tmp_path / "run").values())
    assert sum(found[-3:]) < 0.8 * sum(found[:3])
    head = inspect_head(tmp_path / "run" / "head").config
    assert (head.compressor, head.global_feature) == (compressor, False)
    assert (head.layer0_input_norm, head.num_query_tokens) == (True, 1)
    assert load_draft(tmp_path / "run" / "head").compressor is not None
    resolved = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert resolved["loss"]["name"] == "specvlm"
    card = (tmp_path / "run" / "head" / "README.md").read_text()
    assert f"| compressor | {compressor} |" in card


def test_the_log_tells_what_the_gate_chose(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, cache: str
) -> None:
    config = cached(tiny, dialogues, tmp_path / "run", cache, head__compressor=SELECT,
                    schedule__max_steps=6, run__log_every=3)  # fmt: skip
    run(config)
    logged = lines(tmp_path / "run", "train")
    assert [line["step"] for line in logged] == [3, 6]
    for line in (*logged, *lines(tmp_path / "run", "validation")):
        gate = line["gate"]
        for name in ("chosen", "share"):
            assert set(gate[name]) == BRANCHES
            assert sum(gate[name].values()) == pytest.approx(1.0, abs=1e-3)
    # A draw of a fresh gate: several branches; 12 samples in three steps, some without images.
    assert sum(share > 0 for share in logged[0]["gate"]["chosen"].values()) > 1
    assert 3 < logged[0]["gate"]["turns"] < 12
    assert logged[0]["loss_balance"] > 0


def test_heads_start_from_other_heads(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, cache: str
) -> None:
    def trained(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        run(cached(tiny, dialogues, tmp_path / name, cache, schedule__max_steps=1,
                   optimizer__lr=0.0, **changes))  # fmt: skip
        return load_draft(tmp_path / name / "head").state_dict()

    def head(name: str) -> str:
        return str(tmp_path / name / "head")

    plain = trained("plain", head__kind="eagle_vlm", run__seed=5)
    fresh = trained("fresh", head__compressor=SELECT, head__init_from=head("plain"))
    assert all(torch.equal(fresh[name], plain[name]) for name in plain)
    assert {name.split(".")[0] for name in fresh.keys() - plain.keys()} == {"compressor"}
    again = trained("again", head__compressor=SELECT, head__init_from=head("fresh"), run__seed=6)
    assert all(torch.equal(again[name], fresh[name]) for name in fresh)
    # The adaptor's last query is the global feature; it is taken over alone.
    adaptor = trained("adaptor", head__kind="vispec", run__seed=7)
    both = trained(
        "both",
        head__kind="specvlm_global",
        head__compressor="conv:2",
        head__init_from=head("adaptor"),
        head__input_norm="on",
    )
    assert torch.equal(both["img_adaptor.query"], adaptor["img_adaptor.query"][-1:])
    assert torch.equal(both["img_adaptor.k_proj.weight"], adaptor["img_adaptor.k_proj.weight"])
    assert both["layer.input_layernorm.weight"].tolist() == [1.0] * len(both["fc.bias"])
    with pytest.raises(ViSpecError, match=r"compressor is pool:2, head.init_from .* has select"):
        trained("wrong", head__compressor="pool:2", head__init_from=head("fresh"))

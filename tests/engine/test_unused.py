"""Installed and unused, the plugin changes nothing; plain EAGLE heads stay vLLM's own.

And a vLLM without one of its model runners serves heads with the other.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.child import ChildError
from tests.support.drafts import DRAFTS
from tests.support.engine import Engine, StartEngine, StartProcess
from tests.support.heads import write_config
from tests.support.spies import drafter
from tests.support.tiny_families import FAMILIES, HIDDEN
from tests.support.tiny_models import vote_for_successors
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import assert_lossless, mixed_requests, serve_requests

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

WRAPPED = [
    "vllm.config.vllm.VllmConfig.num_lookahead_tokens",
    "vllm.engine.arg_utils.EngineArgs.create_engine_config",
    "vllm.engine.arg_utils.EngineArgs.create_speculative_config",
    "vllm.engine.arg_utils.maybe_override_with_speculators",
    "vllm.v1.worker.worker_base.WorkerBase.__init__",
]
ARCHITECTURES = [
    "EagleDraftModelForCausalLM",
    "EagleDraftVlmForCausalLM",
    "EagleViSpecEmbedsForCausalLM",
    "EagleViSpecForCausalLM",
]
OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
# Modules that only an engine with a ViSpec head may import.
PROPOSERS = ("vllm_vispec.v1.proposer", "vllm_vispec.spec_decode.speculator")
UNTOUCHED = {"own_new": False, "proposers": []}


def test_unused(engine: StartEngine, tiny: TinyStore, tmp_path: Path) -> None:
    """A plain engine without and with the plugin; a text-only target with a plain EAGLE head.

    Loading the plugin wraps five functions and adds three architectures: every other attribute of
    every loaded vLLM module and class is the same object as before.
    """
    build_eagle_pair(tiny.target("llava"), tmp_path / "target", tmp_path / "head")
    requests = mixed_requests(KIND, 16)

    def start(plugins: str, **options: Any) -> Engine:
        env = {"VLLM_PLUGINS": plugins}
        return engine("v1", env=env, process="unused", **OPTIONS, **options)

    without, with_plugin = start("none"), start("vispec")
    expected = without.run(serve_requests, requests)
    assert without.run(_looks) == {"wrapped": [False, False], "drafter": None, **UNTOUCHED}
    assert with_plugin.run(serve_requests, requests).outputs() == expected.outputs()
    assert with_plugin.run(_looks) == {"wrapped": [True, True], "drafter": None, **UNTOUCHED}
    text = [request for request in requests if not request.images]
    target = str(tmp_path / "target")
    plain = start("vispec", model=target)
    eagle = start("vispec", model=target, draft=str(tmp_path / "head"), method="eagle")
    found = eagle.run(serve_requests, text)
    assert eagle.run(_looks) == {"wrapped": [True, True], "drafter": "EagleProposer", **UNTOUCHED}
    assert_lossless(plain.run(serve_requests, text), found)
    assert found.acceptance() > 0
    first, second, added, parsers_same = without.child.call(_register_twice)
    assert first == WRAPPED
    assert second == []
    assert added == ARCHITECTURES
    assert parsers_same


V1, V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"
# By the runner that stays: what is gone, what of it other parts of vLLM use, what a file that
# imports the other runner all the same says then, and our drafters.
REMOVED: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, str], tuple[str, str]]] = {
    "v2": (
        ("v1/worker/gpu_model_runner.py", "v1/worker/cpu_model_runner.py", "v1/spec_decode/"),
        tuple(
            f"v1/spec_decode/{name}"
            for name in ("__init__.py", "metadata.py", "metrics.py", "utils.py", "dynamic/")
        ),
        ("v1/worker/cpu_worker.py", "from vllm.v1.worker.cpu_model_runner import CPUModelRunner"),
        ("ViSpecSpeculator", "TreeSpeculator"),
    ),
    "v1": (
        ("v1/worker/gpu/model_runner.py", "v1/worker/gpu/spec_decode/"),
        # V1's proposers import models, one of which imports this.
        tuple(
            f"v1/worker/gpu/spec_decode/{name}.py"
            for name in ("__init__", "eagle/__init__", "eagle/eagle3_utils")
        ),
        ("v1/worker/gpu/warmup.py", f"from {V2} import GPUModelRunner"),
        ("ViSpecProposer", "TreeProposer"),
    ),
}


def vllm_without(folder: Path, runner: str) -> Path:
    """Link the installed vLLM, as a later release may be without the other runner's files.

    Put first on ``PYTHONPATH`` of a fresh process, ``folder`` has the vLLM there.
    """
    gone, kept, (importing, line), _ = REMOVED[runner]
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent
    for path in source.rglob("*"):
        name = path.relative_to(source).as_posix()
        is_gone = name.startswith(gone) and not name.startswith(kept)
        if path.is_file() and not is_gone and "__pycache__" not in name:
            place = folder / "vllm" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    text = (source / importing).read_text(encoding="utf-8")
    assert line in text
    (folder / "vllm" / importing).unlink()
    changed = text.replace(line, f"{line.split()[-1]} = None")
    (folder / "vllm" / importing).write_text(changed, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "runner", [pytest.param("v2", marks=pytest.mark.v2), pytest.param("v1", marks=pytest.mark.slow)]
)
def test_without_the_other_runner(
    engine: StartEngine, child: StartProcess, tiny: TinyStore, tmp_path: Path, runner: str
) -> None:
    """Its runner's file and its proposers are not there, nor imported by us."""
    drafters = REMOVED[runner][-1]
    env = {"PYTHONPATH": str(vllm_without(tmp_path, runner))}
    assert child(runner, env).call(find_spec, V1 if runner == "v2" else V2) is None
    options = {**OPTIONS, "max_num_batched_tokens": 128, "env": env}
    requests = mixed_requests(KIND, 6, 12)
    plain = engine(runner, **options).run(serve_requests, requests)
    for name, draft in zip(drafters, ("chain", "tree"), strict=True):
        ours = engine(runner, **options, **DRAFTS[draft].of(tiny))
        found = ours.run(serve_requests, requests)
        assert ours.run(_looks)["drafter"] == name
        assert_lossless(plain, found)
        assert found.acceptance() > 0
    other = {"v1": "V2", "v2": "V1"}[runner]
    with pytest.raises(ChildError) as refused:
        ours.run(_ask_for_the_other_runner, str(tiny.target()))
    message = str(refused.value)
    assert f"ViSpecError: ViSpec on the {other} model runner: patch point vllm.v1." in message
    assert "use the other model runner (VLLM_USE_V2_MODEL_RUNNER=" in message


def build_eagle_pair(source: Path, target: Path, head: Path) -> None:
    """Write a tiny Llama ``target`` with ``source``'s tokenizer, and a plain EAGLE ``head``."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    family = FAMILIES["llava"]
    config = LlamaConfig(**family.config().text_config.to_dict())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float().eval()
        noise = torch.randn(HIDDEN, HIDDEN) * HIDDEN**-0.5 * 0.3
    embedding = model.model.embed_tokens.weight.data
    embedding.normal_(generator=torch.Generator().manual_seed(1))
    vote_for_successors(model, family, 0)
    model.save_pretrained(target)
    for file in source.glob("*token*.json"):
        shutil.copy(file, target / file.name)
    head.mkdir()
    layer = model.model.layers[0].state_dict()
    del layer["input_layernorm.weight"]  # EAGLE's layer has none
    tensors = {f"layers.0.{name}": tensor.clone() for name, tensor in layer.items()}
    tensors["fc.weight"] = torch.cat([torch.eye(HIDDEN), noise], dim=1)
    tensors["embed_tokens.weight"] = embedding.clone()
    save_file(tensors, head / "model.safetensors", metadata={"format": "pt"})
    settings = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    write_config(head, settings)


# What follows runs in the child.


def _snapshot() -> dict[str, Any]:
    """Return every attribute of vLLM's loaded modules and classes by dotted name."""
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith("vllm.") or not isinstance(module, ModuleType):
            continue
        for key, value in list(vars(module).items()):
            # Importing a submodule sets it on its package; that is no change of ours.
            if isinstance(value, ModuleType) or key.startswith("__"):
                continue
            found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}.{key}.{attr}": item for attr, item in vars(value).items()}
            elif isinstance(value, dict):
                found[f"{name}.{key}()"] = dict(value)
    return found


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names whose objects are not the same any more; lazily filled caches apart."""
    changed = []
    for name, value in before.items():
        now = after.get(name)
        same = now == value if name.endswith("()") else now is value
        if not same and not name.endswith((".__dict__", "__weakref__")):
            changed.append(name)
    return sorted(changed)


def _register_twice() -> tuple[list[str], list[str], list[str], bool]:
    """Load the plugin twice; what changed each time, new architectures, and no new parser."""
    # What the plugin touches or looks at, so that loading it imports little more.
    import vllm.engine.arg_utils
    import vllm.v1.spec_decode.eagle
    import vllm.v1.worker.gpu_worker  # noqa: F401
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils import config

    from vllm_vispec.plugin import find_problem, register

    assert find_problem() is None  # imports what the check needs
    architectures = set(ModelRegistry.get_supported_archs())
    parsers = dict(config._CONFIG_FORMAT_TO_CONFIG_PARSER)
    start = _snapshot()
    register()
    once = _snapshot()
    register()
    return (
        _changes(start, once),
        _changes(once, _snapshot()),
        sorted(set(ModelRegistry.get_supported_archs()) - architectures),
        dict(config._CONFIG_FORMAT_TO_CONFIG_PARSER) == parsers,
    )


def _looks(llm: Any) -> dict[str, Any]:
    """Return what a ViSpec head would have changed."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerBase

    eagle = sys.modules.get("vllm.v1.spec_decode.eagle")
    draft = drafter(llm)
    return {
        "wrapped": [
            hasattr(function, "__wrapped__")
            for function in (EngineArgs.create_speculative_config, WorkerBase.__init__)
        ],
        "own_new": eagle is not None and "__new__" in vars(eagle.EagleProposer),
        "drafter": type(draft).__name__ if draft is not None else None,
        "proposers": [name for name in PROPOSERS if name in sys.modules],
    }


def _ask_for_the_other_runner(llm: Any, target: str) -> None:
    from vllm import envs
    from vllm.engine.arg_utils import EngineArgs

    from vllm_vispec.compat.check import require
    from vllm_vispec.spec_decode.patch_points import CHAINS

    if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0":
        # Without Triton vLLM itself refuses V2 here, before we are asked.
        require(CHAINS)
    # While an engine runs, vLLM keeps what it has read.
    envs.disable_envs_cache()
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    draft = llm.llm_engine.vllm_config.speculative_config.draft_model_config.model
    config = {"method": "vispec", "model": draft, "num_speculative_tokens": 3}
    EngineArgs(model=target, speculative_config=config).create_engine_config()

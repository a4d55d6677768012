"""Settings that must be refused at start, and a job that tries them all in one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support import engine
from tests.support.heads import edit_config, edit_tensors, write_config, write_head
from tests.support.tiny_configs import HEAD_DIM, HIDDEN, VOCAB
from tests.support.tiny_heads import HeadSpec
from tests.support.tiny_store import TinyStore
from vllm_vispec.draft_vocab.files import write_vocab
from vllm_vispec.heads.folder import DRAFT_VOCAB
from vllm_vispec.heads.speculators import SPECULATORS_TYPE

Spoil = Callable[[Path], None]


@dataclass(frozen=True)
class BadStart:
    """One refused start.

    Attributes:
        message: Regular expression that the error matches.
        spoil: Changes a copy of a good head.
        spec: Changes to the speculative config; None removes a key.
        engine: Further engine arguments.
        target: ``vision``, ``text``, or ``head``: one that names its target.
        error: Name of the exception's class.
    """

    message: str
    spoil: Spoil | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    target: str = "vision"
    error: str = "ViSpecError"


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def _truncate(folder: Path) -> None:
    data = _weights(folder).read_bytes()
    _weights(folder).write_bytes(data[: len(data) // 2])


def _pickle_only(folder: Path) -> None:
    _weights(folder).rename(folder / "pytorch_model.bin")


def _drop(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        edit_tensors(folder, lambda tensors: tensors.__delitem__(name))

    return spoil


def _add(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        import torch

        edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(4)}))

    return spoil


def _rewrite(dialect: str = "reference", **changes: Any) -> Spoil:
    """Replace the head by one with other sizes."""
    sizes = {
        "hidden_size": HIDDEN,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "intermediate_size": 48,
    }

    def spoil(folder: Path) -> None:
        write_head(folder, dialect, **(sizes | changes))

    return spoil


def _only(tensors: Mapping[str, tuple[int, ...]], architecture: str) -> Spoil:
    """Replace the head by other weights."""

    def spoil(folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        save_file({name: torch.zeros(size) for name, size in tensors.items()}, _weights(folder))
        write_config(folder, {"architectures": [architecture]})

    return spoil


def _canonical_without_section(folder: Path) -> None:
    write_head(folder, "canonical")
    config = json.loads((folder / "config.json").read_text())
    del config["vispec"], config["architectures"]
    write_config(folder, config)


COUNT = r"num_speculative_tokens={} must be an integer between 1 and \d+; 3 to 6 suits"
EAGLE = {"fc.weight": (HIDDEN, 2 * HIDDEN), "layers.0.mlp.up_proj.weight": (48, HIDDEN)}
EAGLE3 = {"fc.weight": (HIDDEN, 3 * HIDDEN), "d2t": (8,)}

TREE = {"tree": {"policy": "eagle2"}, "num_speculative_tokens": 29}
EXAMPLE_CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "lm_head": True}

BAD_STARTS: Mapping[str, BadStart] = {
    "heads that no backend serves": BadStart(
        "no attention backend here serves heads of 518 channels.*leave the speculative config out",
        spoil=_rewrite("canonical", head_dim=512),
    ),
    "missing folder": BadStart(
        "head folder '/nowhere/head' does not exist.*give", spec={"model": "/nowhere/head"}
    ),
    "no model": BadStart('"model" is missing; give the folder', spec={"model": None}),
    "empty model": BadStart('"model" is missing; give the folder', spec={"model": ""}),
    "no config": BadStart(
        r"config\.json is missing", lambda folder: (folder / "config.json").unlink()
    ),
    "truncated weights": BadStart("truncated or corrupt.*download or export", _truncate),
    "pickle only": BadStart(
        "only pickle weights.*convert them to safetensors",
        _pickle_only,
    ),
    "missing tensor": BadStart(r"lacks 1 tensor\(s\): fc\.weight.*export", _drop("fc.weight")),
    "missing tensor of a head given as eagle": BadStart(
        r"lacks 1 tensor\(s\): fc\.weight.*export", _drop("fc.weight"), spec={"method": "eagle"}
    ),
    "extra tensor": BadStart(r"account for: lm_head\.weight.*remove", _add("lm_head.weight")),
    "config of another head": BadStart(
        r"has shape .*config\.json asks for.*use the config\.json",
        lambda folder: edit_config(folder, intermediate_size=7),
    ),
    "wrong hidden size": BadStart(
        rf"hidden_size of the head is 64.*is {HIDDEN}: use the head that was trained",
        _rewrite(hidden_size=64, head_dim=16),
    ),
    "wrong vocabulary": BadStart(
        rf"vocab_size of the head is 999.*is {VOCAB}: use the head that was trained",
        _rewrite(vocab_size=999),
    ),
    "head of another family": BadStart(
        "trained for llava, the target is qwen2_5_vl: use the head that was trained",
        lambda folder: edit_config(folder, model_type="llava"),
    ),
    "EAGLE head": BadStart(
        'text-only EAGLE head.*"method":"eagle"', _only(EAGLE, "LlamaForCausalLM")
    ),
    "EAGLE-3 head": BadStart(
        'EAGLE-3 head.*"method":"eagle3"', _only(EAGLE3, "LlamaForCausalLMEagle3")
    ),
    "unknown dialect": BadStart("unknown dialect.*expected one of.*give", _only({"w": (2,)}, "X")),
    "K missing": BadStart(COUNT.format("None"), spec={"num_speculative_tokens": None}),
    "K is 0": BadStart(COUNT.format("0"), spec={"num_speculative_tokens": 0}),
    "K is -1": BadStart(COUNT.format("-1"), spec={"num_speculative_tokens": -1}),
    "K is 100": BadStart(COUNT.format("100"), spec={"num_speculative_tokens": 100}),
    "K is a word": BadStart(COUNT.format("'four'"), spec={"num_speculative_tokens": "four"}),
    "K is true": BadStart(COUNT.format("True"), spec={"num_speculative_tokens": True}),
    "K is 2.5": BadStart(COUNT.format(r"2\.5"), spec={"num_speculative_tokens": 2.5}),
    "text-only target": BadStart("takes no images; ViSpec needs a vision-language", target="text"),
    "no image table": BadStart(
        "image_table_size=0 must be an integer.*leave it out", spec={"image_table_size": 0}
    ),
    "parallel drafting": BadStart(
        "parallel_drafting does not work with ViSpec.*leave it out",
        spec={"parallel_drafting": True},
    ),
    "other vocabularies": BadStart(
        "use_heterogeneous_vocab does not work.*leave it out",
        spec={"use_heterogeneous_vocab": True},
    ),
    "draft TP differs": BadStart(
        "draft_tensor_parallel_size=2 must equal the target's 1; leave it out",
        spec={"draft_tensor_parallel_size": 2},
    ),
    "TP does not fit": BadStart(
        "tensor_parallel_size=3 does not fit the head's 4 .*choose one of 1, 2, 4",
        engine={"tensor_parallel_size": 3},
    ),
    "pipeline parallel": BadStart(
        "pipeline_parallel_size=2 does not work with ViSpec.*set it to 1",
        engine={"pipeline_parallel_size": 2},
    ),
    "tree is no object": BadStart(
        "tree='eagle2' must be an object such as", spec={"tree": "eagle2"}
    ),
    "tree with an unknown key": BadStart(
        r"tree\.width is unknown; the keys are policy", spec={"tree": {"width": 3}}
    ),
    "tree with too few nodes": BadStart(
        "num_speculative_tokens=3 must be an integer between 4 and 127: with a tree",
        spec={"tree": {}},
    ),
    "tree with too many nodes": BadStart(
        "num_speculative_tokens=29 must be an integer between 2 and 6",
        spec={"tree": {"depth": 1, "top_k": 2}, "num_speculative_tokens": 29},
    ),
    "tree with a sampled draft": BadStart(
        "draft_sample_method='probabilistic' does not work with tree.*leave one of them out",
        spec={**TREE, "draft_sample_method": "probabilistic"},
    ),
    "tree with a connector": BadStart(
        "kv_connector=ExampleConnector may save keys before.*choose one of.*leave",
        spec=TREE,
        engine={"kv_transfer_config": EXAMPLE_CONNECTOR},
    ),
    "tree with a quantized cache": BadStart(
        "kv_cache_dtype=fp8_e5m2 does not work with tree.*leave one of them out",
        spec=TREE,
        engine={"kv_cache_dtype": "fp8_e5m2"},
    ),
    "draft_vocab of a quantized lm_head": BadStart(
        r"draft_vocab needs an lm_head in .*quantized \(awq\): leave draft_vocab out",
        lambda folder: write_vocab(folder / DRAFT_VOCAB, [1, 2]),
        spec={"draft_vocab": "auto"},
        engine={"hf_overrides": {"quantization_config": AWQ}},
    ),
    "chain that calls itself a tree": BadStart(
        COUNT.format("100"), spec={"tree": {"policy": "chain"}, "num_speculative_tokens": 100}
    ),
    "tree with batches taken apart": BadStart(
        "data_parallel_size=2 does not work with tree.*leave one of them out",
        spec=TREE,
        engine={"data_parallel_size": 2},
    ),
    "unknown key": BadStart(
        r'key "no_such_key" is unknown; leave it out \(ViSpec\'s keys are draft_vocab, ',
        spec={"no_such_key": 1},
    ),
    "misspelt key": BadStart(
        r'key "num_speculative_token" is unknown; did you mean "num_speculative_tokens"\?',
        spec={"num_speculative_tokens": None, "num_speculative_token": 4},
    ),
    "misspelt key of the plugin": BadStart(
        r'key "draft_vocabs" is unknown; did you mean "draft_vocab"\?',
        spec={"draft-vocabs": "auto"},
    ),
    "misspelt key of the tree": BadStart(
        r'tree\.topk is unknown; did you mean "top_k"\?', spec=TREE | {"tree": {"topk": 4}}
    ),
    "method under a misspelt key": BadStart(
        r'key "metod" is unknown; did you mean "method"\?', spec={"method": None, "metod": "vispec"}
    ),
    "misspelt method": BadStart(
        "method=.vispek. is unknown; did you mean .vispec..? choose one of vispec, ngram, .*eagle3",
        spec={"method": "vispek"},
    ),
    "another method": BadStart(
        'method=.draft_model. does not fit, .* is a ViSpec head; use "method": "vispec"',
        spec={"method": "draft_model"},
    ),
    "no method": BadStart(COUNT.format("77"), spec={"method": None, "num_speculative_tokens": 77}),
    "no such method": BadStart(
        "method='no such' is unknown; choose one of vispec, ", spec={"method": "no such"}
    ),
    "config without our section": BadStart(
        'config.json of the head has no "vispec" section.*restore the config.json',
        _canonical_without_section,
    ),
    "flags in place of the config": BadStart(
        COUNT.format("77"),
        spec=dict.fromkeys(("method", "num_speculative_tokens")),
        engine={"spec_method": "vispec", "spec_tokens": 77},
    ),
    "key and flag": BadStart(
        "num_speculative_tokens is given twice, here and as --spec-tokens; leave one of them out",
        engine={"spec_tokens": 4},
    ),
}


class Attempts:
    """Tries starts with the tiny target; engines are configured, never built."""

    def __init__(self, folder: Path) -> None:
        store = TinyStore(folder / "tiny")
        self._folder = folder
        self._head = store.head(HeadSpec("qwen2_5_vl"))
        vision = store.target("qwen2_5_vl")
        self._targets = {
            "vision": vision,
            "text": text_target(folder / "text", vision),
            "head": _head_with_target(self._head, folder / "head-with-target", vision),
        }

    def attempt(self, case: BadStart, name: str = "head") -> dict[str, str]:
        """Return the class and the message of the error, both empty without one."""
        from vllm.engine.arg_utils import EngineArgs

        head = self._folder / name.replace(" ", "-")
        shutil.copytree(self._head, head)
        if case.spoil is not None:
            case.spoil(head)
        spec: dict[str, Any] = {"method": "vispec", "model": str(head), "num_speculative_tokens": 3}
        spec |= case.spec
        try:
            EngineArgs(
                model=str(self._targets[case.target]),
                speculative_config={k: v for k, v in spec.items() if v is not None},
                **case.engine,
            ).create_engine_config()
        except Exception as error:
            return {"error": type(error).__name__, "message": str(error)}
        return {"error": "", "message": ""}


def _head_with_target(head: Path, folder: Path, target: Path) -> Path:
    """Write a head that names its target, as far as `vllm serve HEAD` reads it."""
    shutil.copytree(head, folder)
    proposal = {"speculative_tokens": 3}
    section = {"verifier": {"name_or_path": str(target)}, "proposal_methods": [proposal]}
    edit_config(folder, speculators_model_type=SPECULATORS_TYPE, speculators_config=section)
    return folder


def text_target(folder: Path, vision: Path) -> Path:
    """Write the configuration of a text-only target; weights are not needed to refuse it."""
    shutil.copytree(vision, folder, ignore=shutil.ignore_patterns("*.safetensors", "*processor*"))
    text = json.loads((vision / "config.json").read_text())["text_config"]
    text |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    write_config(folder, text)
    return folder


def try_all(folder: str) -> Iterator[dict[str, str]]:
    """Try a good start, all bad ones, and vLLM versions that do not fit (in a child process)."""
    engine.register_plugin()
    attempts = Attempts(Path(folder))
    good = BadStart("")
    yield {"name": "good"} | attempts.attempt(good, "good")
    for name, case in BAD_STARTS.items():
        yield {"name": name} | attempts.attempt(case, name)
    with _registered_anew("check.installed_version", lambda: "0.31.2"):
        yield {"name": "old vLLM"} | attempts.attempt(good, "old")
    with _registered_anew("check.read_module", lambda module: None):
        yield {"name": "broken patch point"} | attempts.attempt(good, "broken")
    tree, served_alone = BadStart("", spec=TREE), BadStart("", target="head")
    with _without("vllm.model_executor.layers.attention.attention", "get_kv_cache_spec"):
        yield {"name": "good without trees"} | attempts.attempt(good, "chain")
        yield {"name": "broken trees"} | attempts.attempt(tree, "tree")
    with _without("vllm.transformers_utils.config", "maybe_override_with_speculators"):
        yield {"name": "good without self-serving"} | attempts.attempt(good, "plain")
        yield {"name": "broken self-serving"} | attempts.attempt(served_alone, "alone")
    yield {"name": "good again"} | attempts.attempt(good, "again")


@contextmanager
def _without(module: str, name: str) -> Iterator[None]:
    """Let vLLM's source text have another name for one of its definitions."""
    from vllm_vispec.compat import check

    read = check.__dict__["read_module"]

    def other(asked: str) -> str | None:
        text: str | None = read(asked)
        return text.replace(name, f"{name}_2") if text and asked == module else text

    with mock.patch.object(check, "read_module", other):
        yield


@contextmanager
def _registered_anew(name: str, replacement: Callable[..., str | None]) -> Iterator[None]:
    """Register the plugin as in a fresh process in which ``compat.<name>`` says something else."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_vispec import plugin

    installed = EngineArgs.create_speculative_config
    EngineArgs.create_speculative_config = installed.__wrapped__
    try:
        with mock.patch(f"vllm_vispec.compat.{name}", replacement):
            plugin.register()
        yield
    finally:
        EngineArgs.create_speculative_config = installed

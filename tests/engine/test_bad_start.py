"""Bad input at start: every case is refused in one line that names the setting and the remedy.

Engines are configured, never built.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from tests.support.engine import StartProcess, register_plugin
from tests.support.heads import edit_config, edit_tensors, write_config, write_head
from tests.support.more_families import ALL_FAMILIES
from tests.support.tiny_families import HEAD_DIM, HIDDEN, VOCAB
from tests.support.tiny_store import KIND, TinyStore
from vllm_vispec.draft_vocab.files import write_vocab
from vllm_vispec.heads.folder import DRAFT_VOCAB
from vllm_vispec.heads.speculators import SPECULATORS_TYPE

Spoil = Callable[[Path], object]


class Start(NamedTuple):
    """One start.

    Attributes:
        message: Regular expression that the error matches; "": there is none.
        spoil: Changes a copy of a good head.
        spec: Changes to the speculative config; None removes a key.
        engine: Further engine arguments.
        target: ``vision``, ``text``, a family, or ``head``: one that names its target.
        vllm: How vLLM differs: ``old``, ``unreadable``, or ``without`` a definition.
    """

    message: str
    spoil: Spoil | None
    spec: Mapping[str, Any]
    engine: Mapping[str, Any]
    target: str
    vllm: str


def _start(
    message: str,
    spoil: Spoil | None = None,
    *,
    engine: Mapping[str, Any] | None = None,
    target: str = "vision",
    vllm: str = "",
    **spec: Any,
) -> Start:
    return Start(message, spoil, spec, engine or {}, target, vllm)


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def _truncate(folder: Path) -> None:
    data = _weights(folder).read_bytes()
    _weights(folder).write_bytes(data[: len(data) // 2])


def _pickle_only(folder: Path) -> None:
    _weights(folder).rename(folder / "pytorch_model.bin")


def _drop(name: str) -> Spoil:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.__delitem__(name))


def _add(name: str) -> Spoil:
    return lambda folder: edit_tensors(
        folder, lambda tensors: tensors.update({name: torch.zeros(4)})
    )


def _rewrite(checkpoint_format: str = "reference", **changes: Any) -> Spoil:
    """Replace the head by one with other sizes."""
    sizes = {"hidden_size": HIDDEN, "head_dim": HEAD_DIM, "vocab_size": VOCAB}
    return lambda folder: write_head(
        folder, checkpoint_format, **(sizes | {"intermediate_size": 48} | changes)
    )


def _only(tensors: Mapping[str, tuple[int, ...]], architecture: str) -> Spoil:
    """Replace the head by other weights."""

    def spoil(folder: Path) -> None:
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

DASHED: dict[str, Any] = {"draft-vocabs": "auto"}
LACKS_FC = r"lacks 1 tensor\(s\): fc\.weight.*export"
TREE: dict[str, Any] = {"tree": {"policy": "eagle2"}, "num_speculative_tokens": 29}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "lm_head": True}
EXAMPLE_CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


def _count(value: Any, pattern: str = "") -> Start:
    return _start(COUNT.format(pattern or value), num_speculative_tokens=value)


STARTS: Mapping[str, Start] = {
    "heads that no backend serves": _start(
        "no attention backend here serves heads of 518 channels.*leave the speculative config out",
        _rewrite("canonical", head_dim=512),
    ),
    "missing folder": _start(
        "draft folder '/nowhere/head' does not exist.*give", model="/nowhere/head"
    ),
    "no model": _start('"model" is missing; give the folder', model=None),
    "empty model": _start('"model" is missing; give the folder', model=""),
    "no config": _start(
        r"config\.json is missing", lambda folder: (folder / "config.json").unlink()
    ),
    "truncated weights": _start("truncated or corrupt.*download or export", _truncate),
    "pickle only": _start("only pickle weights.*convert them to safetensors", _pickle_only),
    "missing tensor": _start(LACKS_FC, _drop("fc.weight")),
    "missing tensor of a head given as eagle": _start(LACKS_FC, _drop("fc.weight"), method="eagle"),
    "extra tensor": _start(r"account for: lm_head\.weight.*remove", _add("lm_head.weight")),
    "config of another head": _start(
        r"has shape .*config\.json asks for.*use the config\.json",
        lambda folder: edit_config(folder, intermediate_size=7),
    ),
    "wrong hidden size": _start(
        rf"hidden_size of the head is 64.*is {HIDDEN}: use the head that was trained",
        _rewrite(hidden_size=64, head_dim=16),
    ),
    "wrong vocabulary": _start(
        rf"vocab_size of the head is 999.*is {VOCAB}: use the head that was trained",
        _rewrite(vocab_size=999),
    ),
    "head of another family": _start(
        "trained for llava, the target is qwen2_5_vl: use the head that was trained",
        lambda folder: edit_config(folder, model_type="llava"),
    ),
    "EAGLE head": _start(
        '"checkpoint_format":"msd".*"method":"eagle"', _only(EAGLE, "LlamaForCausalLM")
    ),
    "EAGLE-3 head": _start(
        'EAGLE-3 head.*"method":"eagle3"', _only(EAGLE3, "LlamaForCausalLMEagle3")
    ),
    "unknown format": _start(
        "unknown checkpoint format.*expected one of.*give", _only({"w": (2,)}, "X")
    ),
    "K missing": _count(None),
    "K is 0": _count(0),
    "K is -1": _count(-1),
    "K is 100": _count(100),
    "K is a word": _count("four", "'four'"),
    "K is true": _count(True),
    "K is 2.5": _count(2.5, r"2\.5"),
    "prefix-LM": _start(
        r"gemma3-0 attends over images in both directions .*; serve it without the head",
        target="gemma3",
    ),
    "sliding windows in trees": _start(
        "a sliding window, which draft trees cannot pass through",
        _rewrite("canonical", target_model_type="gemma4"),
        target="gemma4",
        **TREE,
    ),
    "text-only target": _start("takes no images; ViSpec needs a vision-language", target="text"),
    "no image table": _start(
        "image_table_size=0 must be an integer.*leave it out", image_table_size=0
    ),
    "parallel drafting": _start(
        "parallel_drafting does not work with ViSpec.*leave it out", parallel_drafting=True
    ),
    "other vocabularies": _start(
        "use_heterogeneous_vocab does not work.*leave it out", use_heterogeneous_vocab=True
    ),
    "draft TP differs": _start(
        "draft_tensor_parallel_size=2 must equal the target's 1; leave it out",
        draft_tensor_parallel_size=2,
    ),
    "TP does not fit": _start(
        "tensor_parallel_size=3 does not fit the draft's 4 .*choose one of 1, 2, 4",
        engine={"tensor_parallel_size": 3},
    ),
    "pipeline parallel": _start(
        "pipeline_parallel_size=2 does not work with ViSpec.*set it to 1",
        engine={"pipeline_parallel_size": 2},
    ),
    "tree is no object": _start(
        "tree is 'eagle2': give name: value pairs of policy, depth, top_k", tree="eagle2"
    ),
    "tree with an unknown key": _start(
        r"tree\.width is unknown; the settings there are policy, depth", tree={"width": 3}
    ),
    "tree with too few nodes": _start(
        "num_speculative_tokens=3 must be an integer between 4 and 127: with a tree", tree={}
    ),
    "tree with too many nodes": _start(
        "num_speculative_tokens=29 must be an integer between 2 and 6",
        tree={"depth": 1, "top_k": 2},
        num_speculative_tokens=29,
    ),
    "tree with a sampled draft": _start(
        "draft_sample_method='probabilistic' does not work with tree.*leave one of them out",
        **TREE,
        draft_sample_method="probabilistic",
    ),
    "tree with a connector": _start(
        "kv_connector=ExampleConnector may save keys before.*choose one of.*leave",
        **TREE,
        engine={"kv_transfer_config": EXAMPLE_CONNECTOR},
    ),
    "tree with a quantized cache": _start(
        "kv_cache_dtype=fp8_e5m2 does not work with tree.*leave one of them out",
        **TREE,
        engine={"kv_cache_dtype": "fp8_e5m2"},
    ),
    "chain that calls itself a tree": _start(
        COUNT.format("100"), tree={"policy": "chain"}, num_speculative_tokens=100
    ),
    "tree with batches taken apart": _start(
        "data_parallel_size=2 does not work with tree.*leave one of them out",
        **TREE,
        engine={"data_parallel_size": 2},
    ),
    "unknown key": _start(
        r'key "no_such_key" is unknown; leave it out \(ViSpec\'s keys are adaptive, ',
        no_such_key=1,
    ),
    "misspelt key": _start(
        r'key "num_speculative_token" is unknown; did you mean "num_speculative_tokens"\?',
        num_speculative_tokens=None,
        num_speculative_token=4,
    ),
    "misspelt key of the plugin": _start(
        r'key "draft_vocabs" is unknown; did you mean "draft_vocab"\?', **DASHED
    ),
    "misspelt key of the tree": _start(
        r'tree\.topk is unknown; did you mean "tree\.top_k"\?', **TREE | {"tree": {"topk": 4}}
    ),
    "method under a misspelt key": _start(
        r'key "metod" is unknown; did you mean "method"\?', method=None, metod="vispec"
    ),
    "misspelt method": _start(
        "method=.vispek. is unknown; did you mean .vispec..? choose one of vispec, ngram, .*eagle3",
        method="vispek",
    ),
    "another method": _start(
        'method=.draft_model. does not fit, .* is a ViSpec head; use "method": "vispec"',
        method="draft_model",
    ),
    "no method": _start(COUNT.format("77"), method=None, num_speculative_tokens=77),
    "no such method": _start(
        "method='no such' is unknown; choose one of vispec, ", method="no such"
    ),
    "config without our section": _start(
        'config.json of the head has no "vispec" section.*restore the config.json',
        _canonical_without_section,
    ),
    "flags in place of the config": _start(
        COUNT.format("77"),
        method=None,
        num_speculative_tokens=None,
        engine={"spec_method": "vispec", "spec_tokens": 77},
    ),
    "key and flag": _start(
        "num_speculative_tokens is given twice, here and as --spec-tokens; leave one of them out",
        engine={"spec_tokens": 4},
    ),
    "draft_vocab of a quantized lm_head": _start(
        r"draft_vocab needs an lm_head in .*quantized \(awq\): leave draft_vocab out",
        lambda folder: write_vocab(folder / DRAFT_VOCAB, [1, 2]),
        draft_vocab="auto",
        engine={"hf_overrides": {"quantization_config": AWQ}},
    ),
    # A vLLM that does not fit disables what needs the missing part, and nothing else.
    "good": _start(""),
    "old vLLM": _start(r"^vLLM 0\.31\.2 is too old; install vLLM 0\.32 to 0\.33$", vllm="old"),
    "broken patch point": _start(
        r"^ViSpec: patch point \S+ does not fit this vLLM.*install vLLM 0\.32 to 0\.33",
        vllm="unreadable",
    ),
    "good without trees": _start("", vllm="without get_kv_cache_spec"),
    "broken trees": _start(
        r'^draft trees, .*: patch point \S+Attention\.get_kv_cache_spec .*; leave "tree" and "',
        vllm="without get_kv_cache_spec",
        **TREE,
    ),
    "good without self-serving": _start("", vllm="without maybe_override_with_speculators"),
    "broken self-serving": _start(
        r"^serving a head with the target it names: .*; serve the target, with the head in",
        vllm="without maybe_override_with_speculators",
        target="head",
    ),
    "good again": _start(""),
}


@pytest.fixture(scope="module")
def folder(tiny: TinyStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the good head, of all targets, and of what is tried."""
    found = tmp_path_factory.mktemp("starts")
    shutil.copytree(tiny.head(), found / "head with target")
    proposal = {"verifier": {"name_or_path": str(tiny.target())}}
    section = {**proposal, "proposal_methods": [{"speculative_tokens": 3}]}
    edit_config(
        found / "head with target",
        speculators_model_type=SPECULATORS_TYPE,
        speculators_config=section,
    )
    write_text_target(found / "text", tiny.target())
    return found


def write_text_target(folder: Path, vision: Path) -> None:
    """Write the configuration of a text-only target; weights are not needed to refuse it."""
    shutil.copytree(vision, folder, ignore=shutil.ignore_patterns("*.safetensors", "*processor*"))
    text = json.loads((vision / "config.json").read_text())["text_config"]
    text |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    write_config(folder, text)


@pytest.mark.engine
@pytest.mark.parametrize("name", STARTS)
def test_refused(
    child: StartProcess, tiny: TinyStore, folder: Path, tmp_path: Path, name: str
) -> None:
    start = STARTS[name]
    head = shutil.copytree(tiny.head(), tmp_path / "head")
    if start.spoil is not None:
        start.spoil(head)
    spec = {"method": "vispec", "model": str(head), "num_speculative_tokens": 3, **start.spec}
    spec = {key: value for key, value in spec.items() if value is not None}
    named = {"head": folder / "head with target", "text": folder / "text"}
    kind = start.target if start.target in ALL_FAMILIES else KIND
    model = str(named.get(start.target, tiny.target(kind)))
    # Nothing is left behind that would change vLLM, so the process is the other tests'.
    error, message = child("v1").call(_configure, start.vllm, model, spec, dict(start.engine))
    assert error == ("ViSpecError" if start.message else ""), message
    assert re.search(start.message, message), message
    assert "\n" not in message


# What follows runs in the child.


def _configure(
    vllm: str, model: str, spec: dict[str, Any], engine: dict[str, Any]
) -> tuple[str, str]:
    """Return the error's class and message, both empty without one."""
    register_plugin()
    from vllm.engine.arg_utils import EngineArgs

    with _changed(vllm):
        try:
            EngineArgs(model=model, speculative_config=spec, **engine).create_engine_config()
        except Exception as error:
            return type(error).__name__, str(error)
    return "", ""


def _changed(vllm: str) -> Any:
    """Return a context in which vLLM is too old, unreadable, or ``without`` a definition."""
    if vllm == "old":
        return _registered_anew("check.installed_version", lambda: "0.31.2")
    if vllm == "unreadable":
        return _registered_anew("check.read_module", lambda module: None)
    return _without(vllm.removeprefix("without ")) if vllm else nullcontext()


def _without(name: str) -> Any:
    """Let vLLM's source text have another name for one of its definitions."""
    from vllm_vispec.compat import check

    read = check.__dict__["read_module"]

    def other(asked: str) -> str | None:
        text: str | None = read(asked)
        return text.replace(name, f"{name}_2") if text else text

    return mock.patch.object(check, "read_module", other)


@contextmanager
def _registered_anew(name: str, replacement: Callable[..., str | None]) -> Iterator[None]:
    """Register the plugin as in a fresh process in which ``compat.<name>`` says something else."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    from vllm_vispec import plugin

    load_general_plugins()  # once in a process; else with the first `EngineArgs`, over what follows
    installed = EngineArgs.create_speculative_config
    EngineArgs.create_speculative_config = installed.__wrapped__
    try:
        with mock.patch(f"vllm_vispec.compat.{name}", replacement):
            plugin.register()
        yield
    finally:
        EngineArgs.create_speculative_config = installed

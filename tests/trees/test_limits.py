"""What an engine's configuration says about trees: where they branch, and what refuses them."""

from __future__ import annotations

import re
from importlib import import_module
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

import pytest
from vllm.config import VllmConfig
from vllm.config.cache import CacheDType
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.model_executor.layers.attention.static_sink_attention import StaticSinkAttention
from vllm.v1.attention.backend import AttentionImpl

from tools.tables import BACKENDS
from vllm_vispec.config import ViSpecConfig
from vllm_vispec.spec_decode.patch_points import speculator_class
from vllm_vispec.spec_decode.setting_notes import note_settings_without_effect
from vllm_vispec.trees import attention, limits, model_state
from vllm_vispec.trees.attention import _check_backend, _check_layer, padded_impl
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.v1.tree_proposer import TreeProposer

OUT = r'leave "tree" out'
CONFIDENT = TreeSettings(policy="spec_llava", depth=3, top_k=2)
PATH = CONFIDENT.one_branch()
Schedule = list[list[int]] | None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"use_mla": True}, "has latent attention"),
        ({"is_hybrid": True}, "has recurrent"),
        ({"get_sliding_window": lambda: 128}, "has a sliding window"),
        ({"hf_text_config": SimpleNamespace(attn_logit_softcapping=50.0)}, "has a soft cap"),
        ({"hf_text_config": SimpleNamespace(attention_chunk_size=64)}, "has attention in local"),
    ],
)
def test_targets(changes: dict[str, Any], said: str | None) -> None:
    plain = {"use_mla": False, "is_hybrid": False, "get_sliding_window": lambda: None}
    target = {"model": "target", "hf_text_config": SimpleNamespace(), **plain, **changes}
    if said is None:
        limits.check_target(SimpleNamespace(**target))
        return
    with pytest.raises(ViSpecError, match=f"{said}.*{OUT}"):
        limits.check_target(SimpleNamespace(**target))


@pytest.mark.parametrize(
    ("layer_class", "changes", "said"),
    [
        (type("Layer", (Attention,), {}), {}, None),
        (Attention, {"alibi_slopes": [0.5]}, "alibi_slopes"),
        (Attention, {"logits_soft_cap": 30.0}, "logits_soft_cap"),
        (Attention, {"per_layer_sliding_window": 64}, "per_layer_sliding_window"),
        (Attention, {"cache_config": SimpleNamespace(sliding_window=64)}, "per_layer_sliding"),
        (Attention, {"scale": 0.001}, "scale of 0.001"),
        (Attention, {"head_size_v": 64}, "values of another head size"),
        (ChunkedLocalAttention, {}, "ChunkedLocalAttention layers have a"),
        (StaticSinkAttention, {}, "StaticSinkAttention layers have a"),
    ],
)
def test_layers(layer_class: Any, changes: dict[str, Any], said: str | None) -> None:
    plain = dict.fromkeys(("alibi_slopes", "logits_soft_cap", "per_layer_sliding_window"))
    given = {"scale": 128**-0.5, "head_size": 128, "head_size_v": None, "cache_config": None}
    if said is None:
        _check_layer(layer_class, {**plain, **given})
        return
    with pytest.raises(ViSpecError, match=f"{said}.*{OUT}"):
        _check_layer(layer_class, {**plain, **given, **changes})


def test_backends() -> None:
    def built(kv_cache_dtype: str = "auto", stores_inside: bool = False) -> Any:
        backend = SimpleNamespace(
            get_name=lambda: "SOME", forward_includes_kv_cache_update=stores_inside
        )
        return SimpleNamespace(attn_backend=backend, kv_cache_dtype=kv_cache_dtype)

    _check_backend(built())
    with pytest.raises(ViSpecError, match=r"SOME, which stores keys.*leave"):
        _check_backend(built(stores_inside=True))
    with pytest.raises(ViSpecError, match=r"kv_cache_dtype=fp8_e4m3 does not work.*leave one"):
        _check_backend(built("fp8_e4m3"))


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_store_keys_apart(name: str) -> None:
    """Padded keys are stored by the backend's own operator, which all of these have."""
    module, cls, _ = BACKENDS[name]
    backend = getattr(import_module(f"vllm.v1.attention.backends.{module}"), cls)
    assert not backend.forward_includes_kv_cache_update


@pytest.mark.parametrize("name", get_args(CacheDType))
def test_every_quantized_cache_of_vllm_is_refused(name: str) -> None:
    if name in ("auto", "float16", "bfloat16"):
        limits.check_cache_dtype(name)
        return
    with pytest.raises(ViSpecError, match=f"kv_cache_dtype={name} .*leave one of them out"):
        limits.check_cache_dtype(name)


def test_padded_layers_take_part_in_no_fused_operator() -> None:
    """What such an operator writes would not be what the padded layer copies out or stores."""
    questions = [name for name in dir(AttentionImpl) if name.startswith("fused_")]
    assert len(questions) >= 4
    everything = {name: lambda *_: True for name in questions}
    impl = type("Impl", (), everything | {"__init__": lambda *_: None})
    padded = padded_impl(impl, 96)(4, 64)
    for name in questions:
        assert not getattr(padded, name)(*([None] if "output_quant" in name else []))


def test_engines() -> None:
    """Batches must be whole, and who else reads the cache must wait for accepted paths."""
    whole = {"data_parallel_size": 1, "enable_batch_sharded_sampling": False, "enable_dbo": False}

    def config(connector: Any = None, **parallel: Any) -> Any:
        return SimpleNamespace(
            parallel_config=SimpleNamespace(**(whole | parallel)),
            kv_transfer_config=connector and SimpleNamespace(kv_connector=connector),
        )

    for name, value in (("data_parallel_size", 2), ("enable_dbo", True)):
        with pytest.raises(ViSpecError, match=f"{name}={value} does not work with tree.*leave"):
            limits.check_engine(config(**{name: value}), TreeSettings())
    for connector in (None, "NixlConnector"):
        limits.check_engine(config(connector), TreeSettings())
    said = f"LMCacheConnectorV1 may save keys.*{OUT}"
    with pytest.raises(ViSpecError, match=said):
        limits.check_engine(config("LMCacheConnectorV1"), TreeSettings())
    with pytest.raises(ViSpecError, match=said):
        limits.check_connector({"kv_connector": "LMCacheConnectorV1"})
    # Keys of a single path are a chain's.
    limits.check_engine(config("LMCacheConnectorV1"), PATH)


@pytest.mark.parametrize(
    "changes",
    [
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.2},
        {"bad_words": ["a"]},
        {"min_tokens": 3},
        {"structured_outputs": object()},
        {"thinking_token_budget": 10},
    ],
)
def test_requests_whose_sampling_depends_on_the_path_get_chains(changes: dict[str, Any]) -> None:
    plain: dict[str, Any] = {
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
    }
    plain |= {"min_tokens": 0, "bad_words": None, "structured_outputs": None}
    assert not limits.requires_linear_draft(SimpleNamespace(**plain))
    assert limits.requires_linear_draft(SimpleNamespace(**(plain | changes)))


def _graph_config(requests: int, schedule: Any = None, **compilation: Any) -> Any:
    """Return a configuration whose sizes of graphs vLLM itself has chosen."""
    sizes: dict[str, Any] = {"max_cudagraph_capture_size": None, "cudagraph_capture_sizes": None}
    mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=False),
        scheduler_config=SimpleNamespace(max_num_seqs=requests, max_num_batched_tokens=8192),
        compilation_config=SimpleNamespace(
            post_init_cudagraph_sizes=lambda: None,
            **({"cudagraph_mode": mode} | sizes | compilation),
        ),
        speculative_config=SimpleNamespace(
            num_speculative_tokens=29,
            num_speculative_tokens_per_batch_size=schedule,
            uses_dynamic_speculative_decoding=lambda: schedule is not None,
        ),
        num_speculative_tokens=29,
        uniform_decode_query_len=30,
        performance_mode=None,
    )
    VllmConfig._set_cudagraph_sizes(config)
    return config


def _adaptive(config: Any) -> Any:
    config.additional_config = {"vispec": {"adaptive": True}}
    return config


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (_graph_config(256), "up to 17 requests run .*_size=7680 would record all, up to 256"),
        (_graph_config(1024), "up to 17 requests run .*_size=8192 would record all, up to 273"),
        (_graph_config(256, [[1, 20, 29], [21, 256, 4]]), "up to 17 .*_size=608 .* up to 20"),
        (_graph_config(256, max_cudagraph_capture_size=16), "29 nodes, none run .*_size=7680"),
        # Drafted at every load, whatever the schedule says for the sake of its graphs.
        (_adaptive(_graph_config(256, [[1, 1, 29], [2, 2, 0]])), "up to 17 .* up to 256"),
        (_graph_config(16), None),
        # What the line names is enough.
        (_graph_config(1024, max_cudagraph_capture_size=8192), None),
        (_graph_config(256, [[1, 20, 29], [21, 256, 4]], max_cudagraph_capture_size=608), None),
        (_graph_config(256, cudagraph_mode=CUDAGraphMode.PIECEWISE), None),
    ],
)
def test_where_graphs_of_the_target_end(
    config: Any, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, with the option that raises it, where larger batches of trees may come."""
    caplog.set_level("INFO", "vllm")
    limits.note_graphs(config, TreeSettings())
    assert len(caplog.messages) == (said is not None)
    assert re.search(said or "", caplog.text)
    caplog.clear()
    # A single path is a chain, whose graphs vLLM sizes for chains.
    limits.note_graphs(config, PATH)
    assert not caplog.messages


def _drafting(
    tree: TreeSettings | None,
    schedule: Schedule = None,
    num_nodes: int = 29,
    *,
    is_v2: bool = False,
    is_async: bool = False,
    trims: bool = False,
) -> Any:
    speculative = SimpleNamespace(
        num_speculative_tokens=num_nodes,
        num_speculative_tokens_per_batch_size=schedule,
        enable_adaptive_verification=trims,
    )
    return SimpleNamespace(
        speculative_config=speculative,
        additional_config=ViSpecConfig(tree=tree).to_section(),
        scheduler_config=SimpleNamespace(async_scheduling=is_async, max_num_seqs=64),
        use_v2_model_runner=is_v2,
        model_config=SimpleNamespace(is_hybrid=False),
        parallel_config=None,
    )


@pytest.mark.parametrize(
    ("tree", "schedule", "num_nodes", "branches", "chains"),
    [
        (None, None, 29, False, False),
        (TreeSettings(), None, 29, True, False),
        (TreeSettings(), None, 5, True, False),
        # As many nodes as a path has are a chain.
        (TreeSettings(), None, 4, False, True),
        (CONFIDENT, None, 29, True, False),
        (PATH, None, 4, False, True),
        (TreeSettings(), [[1, 4, 29], [5, 64, 4]], 29, True, True),
        (TreeSettings(), [[1, 4, 29], [5, 64, 0]], 29, True, False),
        (TreeSettings(), [[1, 4, 4], [5, 64, 0]], 29, False, True),
        # vLLM drafts no more than num_speculative_tokens, whatever a schedule says.
        (TreeSettings(), [[1, 4, 29], [5, 64, 0]], 4, False, True),
    ],
)
def test_engines_without_branches_are_not_padded(
    tree: TreeSettings | None, schedule: Schedule, num_nodes: int, branches: bool, chains: bool
) -> None:
    """Neither a single path nor a schedule of chains alone needs codes."""
    config = _drafting(tree, schedule, num_nodes)
    assert limits.has_branches(config) is branches
    assert tree is None or limits.schedules_chains(config, tree) is chains
    made: list[object] = []
    with mock.patch.object(attention, "get_current_vllm_config", return_value=config):
        if not branches:
            attention.init_padded(lambda *given, **_: made.extend(given), "layer", "heads")
            assert made == ["layer", "heads"]


class OwnState:
    """A model state of vLLM's with its own sampler."""

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        return sampler, sampler


@pytest.mark.parametrize(
    ("tree", "num_nodes", "speculator", "state"),
    [
        (CONFIDENT, 29, "TreeSpeculator", "TreeModelState"),
        (PATH, 4, "PathSpeculator", "PathModelState"),
        (TreeSettings(), 4, "ViSpecSpeculator", "OwnState"),
    ],
)
def test_v2_has_its_own_sampler_where_drafts_are_no_chains(
    tree: TreeSettings, num_nodes: int, speculator: str, state: str
) -> None:
    """Elsewhere vLLM's, even where another engine was there before."""
    config = _drafting(tree, num_nodes=num_nodes)
    assert speculator_class(config).__name__ == speculator
    found = model_state.resolve_model_state_cls(lambda *_: OwnState, config, "model")
    assert found.__name__ == state
    assert issubclass(found, OwnState)


@pytest.mark.parametrize("make", [model_state.tree_model_state, model_state.path_model_state])
def test_v2_refuses_trees_where_a_target_has_its_own_sampler(make: Any) -> None:
    with pytest.raises(ViSpecError, match=r"its own \(OwnState\.custom_sampler\); leave it out"):
        make(OwnState)().custom_sampler("sampler")


def test_single_paths_are_trees_if_they_may_end_early() -> None:
    settings = {"num_speculative_tokens": 4}
    assert limits.resolve_tree(TreeSettings(top_k=1), settings) is None
    assert limits.resolve_tree(PATH, settings) == PATH


@pytest.mark.parametrize(
    ("runner", "said"),
    [
        ({"is_v2": True}, "save the target no work: the V2 model runner passes over"),
        ({"is_v2": True, "trims": True}, ""),
        ({"is_async": True}, "tree.threshold is ignored: single paths are drafted at full length"),
        ({}, ""),
    ],
)
def test_a_threshold_without_effect_is_named(
    runner: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    note_settings_without_effect(_drafting(PATH, num_nodes=4, **runner))
    assert bool(caplog.text) is bool(said)
    assert said in caplog.text


@pytest.mark.parametrize(
    ("tree", "is_async", "grows"),
    [(CONFIDENT, False, True), (CONFIDENT, True, False), (TreeSettings(), False, False)],
)
def test_v1_cuts_paths_that_the_scheduler_sees(
    tree: TreeSettings, is_async: bool, grows: bool
) -> None:
    """An empty place among drafts on the device would be a token to vLLM's sampler."""
    proposer: Any = object.__new__(TreeProposer)
    proposer.vllm_config = _drafting(tree, [[1, 2, 9], [3, 9, 4]])
    proposer._settings = tree
    proposer._runner = SimpleNamespace(use_async_scheduling=is_async)
    assert (proposer._make_path_grower() is not None) is grows

"""Which engines need path codes: those with trees that branch, at some load."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from vllm_vispec.config import ViSpecConfig
from vllm_vispec.spec_decode.patch_points import speculator_class
from vllm_vispec.spec_decode.setting_notes import note_settings_without_effect
from vllm_vispec.spec_decode.speculator import ViSpecSpeculator
from vllm_vispec.trees import attention
from vllm_vispec.trees import model_state as v2_state
from vllm_vispec.trees.setting import has_branches, resolve_tree
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.trees.speculator import TreeSpeculator
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.v1.tree_proposer import TreeProposer

CONFIDENT = TreeSettings("spec_llava", depth=3, top_k=2)


def _config(
    tree: TreeSettings | None,
    schedule: list[list[int]] | None = None,
    num_nodes: int = 29,
    *,
    is_v2: bool = False,
    is_async: bool = False,
) -> Any:
    speculative = SimpleNamespace(
        num_speculative_tokens=num_nodes, num_speculative_tokens_per_batch_size=schedule
    )
    return SimpleNamespace(
        speculative_config=speculative,
        additional_config=ViSpecConfig(tree=tree).to_section(),
        scheduler_config=SimpleNamespace(async_scheduling=is_async, max_num_seqs=64),
        use_v2_model_runner=is_v2,
    )


@pytest.mark.parametrize(
    ("tree", "schedule", "num_nodes", "branches"),
    [
        (None, None, 29, False),
        (TreeSettings(), None, 29, True),
        (TreeSettings(), None, 5, True),
        # As many nodes as a path has are a chain.
        (TreeSettings(), None, 4, False),
        (CONFIDENT, None, 29, True),
        (CONFIDENT.one_branch(), None, 4, False),
        (TreeSettings(), [[1, 4, 29], [5, 64, 4]], 29, True),
        (TreeSettings(), [[1, 4, 4], [5, 64, 0]], 29, False),
        # vLLM drafts no more than num_speculative_tokens, whatever a schedule says.
        (TreeSettings(), [[1, 4, 29], [5, 64, 0]], 4, False),
    ],
)
def test_engines_without_branches_are_not_padded(
    tree: TreeSettings | None,
    schedule: list[list[int]] | None,
    num_nodes: int,
    branches: bool,
) -> None:
    """Neither a single path nor a schedule of chains alone needs codes."""
    config = _config(tree, schedule, num_nodes)
    assert has_branches(config) is branches
    made: list[object] = []
    with mock.patch.object(attention, "get_current_vllm_config", return_value=config):
        if not branches:
            attention.init_padded(lambda *given: made.extend(given), "layer", "heads")
            assert made == ["layer", "heads"]


def test_v2_keeps_vllms_sampler_for_single_paths() -> None:
    """Even where an engine with branches was in the same process before."""
    state = SimpleNamespace(vllm_config=_config(CONFIDENT.one_branch()))
    assert v2_state.custom_sampler(lambda *_: None, state, "sampler") is None
    assert not hasattr(state, "vispec_trees")


def test_v2_refuses_trees_where_a_target_has_its_own_sampler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OwnState:
        """Overrides `custom_sampler`, so ours is never called."""

    monkeypatch.setattr(ViSpecSpeculator, "set_attn", lambda *_: None)
    speculator = object.__new__(TreeSpeculator)
    with pytest.raises(ViSpecError, match=r"its own \(OwnState\.custom_sampler\); leave it out"):
        TreeSpeculator.set_attn(speculator, OwnState())


def test_single_paths_are_trees_if_they_may_end_early() -> None:
    settings = {"num_speculative_tokens": 4}
    assert resolve_tree(TreeSettings("eagle2", top_k=1), settings) is None
    path = TreeSettings("spec_llava", top_k=1, threshold=0.3)
    assert resolve_tree(path, settings) == path


def test_v2_drafts_single_paths_as_chains() -> None:
    assert speculator_class(_config(CONFIDENT.one_branch(), num_nodes=4)).__name__ == (
        "ViSpecSpeculator"
    )
    assert speculator_class(_config(CONFIDENT)).__name__ == "TreeSpeculator"


@pytest.mark.parametrize(
    ("runner", "said"),
    [
        ({"is_v2": True}, "the V2 model runner's drafts stay on the device"),
        ({"is_async": True}, "with asynchronous scheduling drafts stay on the device"),
        ({}, ""),
    ],
)
def test_a_threshold_without_effect_is_named(
    runner: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    note_settings_without_effect(_config(CONFIDENT.one_branch(), num_nodes=4, **runner))
    assert ("tree.threshold is ignored" in caplog.text) is bool(said)
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
    proposer.vllm_config = _config(tree, [[1, 2, 9], [3, 9, 4]])
    proposer._settings = tree
    proposer._runner = SimpleNamespace(use_async_scheduling=is_async)
    assert (proposer._make_path_grower() is not None) is grows

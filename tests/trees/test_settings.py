"""The setting "tree": what is accepted, and errors that name the key and the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.errors import ViSpecError


def test_defaults_are_the_references() -> None:
    settings = TreeSettings.from_config({})
    assert (settings.policy, settings.depth, settings.top_k) == ("eagle2", 3, 8)
    assert settings.levels == 4
    assert settings.max_nodes == 8 + 3 * 64
    assert settings.draft_slots == 24
    settings.check_nodes(29)


def test_settings_survive_the_way_to_a_worker() -> None:
    settings = TreeSettings("spec_llava", 5, 4, 0.1)
    assert TreeSettings.from_config(settings.to_config()) == settings


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (True, r"tree=True must be an object such as"),
        ({"width": 3}, r"tree\.width is unknown; the keys are policy, depth, top_k, threshold"),
        ({"policy": "wide"}, r"tree\.policy='wide' is unknown; choose one of chain, eagle2"),
        ({"depth": 0}, r"tree\.depth=0 must be an integer between 1 and 15"),
        ({"depth": 2.0}, r"tree\.depth=2\.0 must be an integer"),
        ({"top_k": 11}, r"tree\.top_k=11 must be an integer between 1 and 10"),
        ({"top_k": True}, r"tree\.top_k=True must be an integer"),
        ({"threshold": 0.1}, r"tree\.threshold means nothing to policy 'eagle2'; leave it out"),
        ({"policy": "entropy", "threshold": 1.0}, r"tree\.threshold=1\.0 must lie between 0 and 1"),
        ({"policy": "entropy", "threshold": "a"}, r"tree\.threshold='a' must be a number"),
    ],
)
def test_bad_settings(given: Any, said: str) -> None:
    with pytest.raises(ViSpecError, match=said) as caught:
        TreeSettings.from_config(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_nodes", [3, 201, "29", True, None])
def test_bad_numbers_of_nodes(num_nodes: Any) -> None:
    with pytest.raises(ViSpecError, match=r"num_speculative_tokens=.* between 4 and 127: with a"):
        TreeSettings().check_nodes(num_nodes)


def test_a_single_path_has_one_number_of_nodes() -> None:
    settings = TreeSettings("spec_llava", depth=15, top_k=1)
    settings.check_nodes(16)
    with pytest.raises(ViSpecError, match="num_speculative_tokens=5 must be 16: with a tree"):
        settings.check_nodes(5)

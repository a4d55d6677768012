"""The setting "tree": what is accepted, and errors that name the key and the remedy."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from vllm_vispec.config import ViSpecConfig
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.errors import ViSpecError


def test_defaults_are_the_references() -> None:
    settings = TreeSettings()
    assert (settings.policy, settings.depth, settings.top_k) == ("eagle2", 3, 8)
    assert (settings.levels, settings.draft_slots) == (4, 24)
    settings.check_nodes(29)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (True, r"tree is True: give name: value pairs of policy, depth, top_k, threshold"),
        ({"width": 3}, r"tree\.width is unknown; the settings there are policy, depth"),
        ({"dept": 3}, r'tree\.dept is unknown; did you mean "tree\.depth"'),
        ({"policy": "wide"}, r"tree\.policy is 'wide': use one of eagle2, chain, spec_llava"),
        ({"depth": 0}, r"tree\.depth is 0: give at least 1"),
        ({"depth": 2.0}, r"tree\.depth is 2\.0: give a whole number"),
        ({"top_k": 11}, r"tree\.top_k is 11: give at most 10"),
        ({"top_k": True}, r"tree\.top_k is True: give a whole number"),
        ({"threshold": 0.1}, r"tree\.threshold means nothing to policy 'eagle2'; leave it out"),
        ({"policy": "entropy", "threshold": 1.0}, r"tree\.threshold is 1\.0: give less than 1"),
        ({"policy": "entropy", "threshold": "a"}, r"tree\.threshold is 'a': give a number"),
    ],
)
def test_bad_settings(given: Any, said: str) -> None:
    with pytest.raises(ViSpecError, match=f"^speculative config: {said}") as caught:
        ViSpecConfig.pop_from({"tree": given})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_nodes", [3, 201, "29", True, None])
def test_bad_numbers_of_nodes(num_nodes: Any) -> None:
    with pytest.raises(ViSpecError, match=r"num_speculative_tokens=.* between 4 and 127: with a"):
        TreeSettings().check_nodes(num_nodes)


def test_a_single_path_has_one_number_of_nodes() -> None:
    settings = TreeSettings(policy="spec_llava", depth=15, top_k=1)
    settings.check_nodes(16)
    with pytest.raises(ViSpecError, match="num_speculative_tokens=5 must be 16: with a tree"):
        settings.check_nodes(5)


def test_settings_need_no_torch() -> None:
    """Commands read them, and shall start at once."""
    code = "import sys, vllm_vispec.trees.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

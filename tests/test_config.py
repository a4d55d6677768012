"""Our settings: what is accepted, the way to the workers, errors that name the key."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_vispec.config import ViSpecConfig, settings_of
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.errors import ViSpecError


def test_the_way_to_a_worker_and_back() -> None:
    """Plain data: vLLM hashes and pickles it."""
    speculative = {"method": "vispec", "tree": {"depth": 2}, "draft_vocab": 500}
    config = ViSpecConfig.pop_from(speculative).replace(checkpoint_format="reference")
    assert speculative == {"method": "vispec"}
    section = json.loads(json.dumps({"another plugin's": 1} | config.to_section()))
    found = ViSpecConfig.from_vllm(SimpleNamespace(additional_config=section))
    assert found == config
    assert found.tree == TreeSettings(depth=2)
    assert found.draft_vocab == 500


@pytest.mark.parametrize("sections", [{}, None, object()])
def test_an_engine_without_our_settings_has_the_defaults(sections: Any) -> None:
    config = SimpleNamespace(additional_config=sections)
    assert ViSpecConfig.from_vllm(config) == ViSpecConfig()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"image_table_size": 0}, r"image_table_size=0 must be an integer between 1 and 1000000"),
        ({"image_table_size": True}, r"image_table_size=True must be an integer"),
        ({"draft_vocab": ""}, r"draft_vocab='' must be a file"),
        ({"draft_vocab": 0.5}, r"draft_vocab=0\.5 must be a file"),
        ({"tree": {"width": 3}}, r"tree\.width is unknown"),
        ({"tree": {"depth": "3"}}, r"tree\.depth is '3': give a whole number"),
    ],
)
def test_bad_settings(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ViSpecError, match=rf"^speculative config: {said}") as caught:
        ViSpecConfig.pop_from(given)
    assert "\n" not in str(caught.value)


def test_vllms_flags_for_single_keys() -> None:
    args = SimpleNamespace(speculative_config={"num-speculative-tokens": 3}, spec_method="vispec")
    assert settings_of(args) == {"num_speculative_tokens": 3, "method": "vispec"}
    args.spec_tokens = 4
    with pytest.raises(ViSpecError, match=r"given twice, here and as --spec-tokens; leave one"):
        settings_of(args)

"""A published model that does not fit is refused when the engine is configured, in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_store import TinyStore
from vllm_vispec.utils.errors import ViSpecError


@pytest.fixture(scope="module")
def configure(tiny: TinyStore) -> Callable[..., Any]:
    """Return ``configure(draft, **settings)``: an engine's configuration, with nothing loaded."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_vispec.plugin import register

    register()

    def make(draft: str, engine: dict[str, Any] | None = None, **settings: Any) -> Any:
        args = EngineArgs(
            model=str(tiny.target()),
            max_model_len=256,
            enforce_eager=True,
            speculative_config={
                "method": "vispec",
                "model": draft,
                "num_speculative_tokens": 4,
                **settings,
            },
            **(engine or {}),
        )
        return args.create_engine_config()

    return make


@pytest.fixture
def changed(tiny: TinyStore, tmp_path: Path) -> Callable[..., str]:
    """Return ``changed(file, edit)``: a copy of the sibling with one JSON file edited."""

    def make(name: str, edit: Callable[[dict[str, Any]], None]) -> str:
        folder = tmp_path / "changed"
        shutil.copytree(tiny.sibling(), folder)
        content = json.loads((folder / name).read_text())
        edit(content)
        (folder / name).write_text(json.dumps(content))
        return str(folder)

    return make


def test_a_sibling_is_a_draft(configure: Callable[..., Any], tiny: TinyStore) -> None:
    config = configure(tiny.sibling())
    draft = config.speculative_config.draft_model_config
    assert draft.hf_config.architectures == ["EagleDraftModelForCausalLM"]
    assert not draft.uses_mrope
    assert draft.get_hidden_size() == 96


def test_other_families_are_refused(configure: Callable[..., Any], tiny: TinyStore) -> None:
    with pytest.raises(ViSpecError, match="family qwen3_vl, the target of qwen2_5_vl"):
        configure(tiny.sibling("qwen3_vl"))


def test_another_tokenizer_is_refused(
    configure: Callable[..., Any], changed: Callable[..., str]
) -> None:
    def swap(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    with pytest.raises(ViSpecError, match="token 300 is "):
        configure(changed("tokenizer.json", swap))


def test_another_geometry_is_refused(
    configure: Callable[..., Any], changed: Callable[..., str]
) -> None:
    def patch(content: dict[str, Any]) -> None:
        content["vision_config"]["patch_size"] = 16

    with pytest.raises(ViSpecError, match="patch_size in vision_config is 16, the target's 14"):
        configure(changed("config.json", patch))


def test_a_shorter_draft_is_refused(
    configure: Callable[..., Any], changed: Callable[..., str]
) -> None:
    def shorten(content: dict[str, Any]) -> None:
        content["text_config"]["max_position_embeddings"] = 128

    with pytest.raises(ViSpecError, match="reads 128 tokens at most"):
        configure(changed("config.json", shorten))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tree", {"tree": {"policy": "eagle2", "depth": 3, "top_k": 3}}),
        ("draft_vocab", {"draft_vocab": 100}),
        ("disable_padded_drafter_batch", {"disable_padded_drafter_batch": True}),
        ("images", {"images": "none"}),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(
    configure: Callable[..., Any], tiny: TinyStore, name: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ViSpecError, match=name):
        configure(tiny.sibling(), **settings)

"""A published model that does not fit is refused when the engine is configured, in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.tiny_store import TinyStore
from vllm_vispec.cli import doctor
from vllm_vispec.cli.app import app
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


def _swap_tokens(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def _make_text_model(content: dict[str, Any]) -> None:
    text = content["text_config"]
    content.clear()
    content.update(text, model_type="qwen2", architectures=["Qwen2ForCausalLM"])


def _set(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Return what sets fields; ``text_config__vocab_size`` is one of a section's."""

    def edit(content: dict[str, Any]) -> None:
        for name, value in changes.items():
            *section, field = name.split("__")
            (content[section[0]] if section else content)[field] = value

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("tokenizer.json", _swap_tokens, "token 300 is "),
        ("tokenizer.json", lambda content: content.clear(), "the tokenizer of .* cannot be read"),
        ("config.json", _set(text_config__vocab_size=300), "table has 300 rows, fewer than"),
        (
            "config.json",
            _set(vision_config__patch_size=16),
            "patch_size in vision_config is 16, the target's 14",
        ),
        ("config.json", _set(text_config__max_position_embeddings=128), "reads 128 tokens at most"),
        ("config.json", _make_text_model, "it is a text model"),
        (
            "config.json",
            _set(quantization_config={"quant_method": "unheard_of"}),
            "cannot be used by this vLLM .*unheard_of",
        ),
        (
            "config.json",
            _set(model_type="own_vl", auto_map={"AutoConfig": "configuration_own.OwnConfig"}),
            "cannot be used by this vLLM .*without remote code",
        ),
        (
            "processor_config.json",
            lambda content: content["image_processor"].update(image_mean=[0.0, 0.0, 0.0]),
            "image_mean in the image processor is",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith("json") else None,
)
def test_a_draft_that_does_not_fit_is_refused(
    configure: Callable[..., Any],
    changed: Callable[..., str],
    name: str,
    edit: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    with pytest.raises(ViSpecError, match=message) as caught:
        configure(changed(name, edit))
    assert "\n" not in str(caught.value)


def test_longer_tables_fit(configure: Callable[..., Any], changed: Callable[..., str]) -> None:
    assert configure(changed("config.json", _set(text_config__vocab_size=4096)))


def test_a_larger_draft_is_a_warning(
    configure: Callable[..., Any], tiny: TinyStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    configure(tiny.sibling(num_hidden_layers=6))
    assert "has 6 layers of width 96, the target" in caplog.text
    assert "bytes of KV cache for a token" in caplog.text


def test_heads_must_divide_among_ranks(configure: Callable[..., Any], tiny: TinyStore) -> None:
    with pytest.raises(ViSpecError, match=r"tensor_parallel_size=2 does not fit .* 3 attention"):
        configure(tiny.sibling(), {"tensor_parallel_size": 2})


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("prompts with embeddings", {"enable_mm_embeds": True}),
        ("video_pruning_rate", {"video_pruning_rate": 0.5}),
        ("pipeline_parallel_size", {"pipeline_parallel_size": 2}),
    ],
)
def test_engines_that_do_not_go_with_it_are_refused(
    configure: Callable[..., Any], tiny: TinyStore, name: str, engine: dict[str, Any]
) -> None:
    with pytest.raises(ViSpecError, match=name):
        configure(tiny.sibling(), engine)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("draft_vocab", {"draft_vocab": 100}),
        ("disable_padded_drafter_batch", {"disable_padded_drafter_batch": True}),
        ("enable_adaptive_verification", {"enable_adaptive_verification": True}),
        ("use_local_argmax_reduction", {"use_local_argmax_reduction": True}),
        ("images", {"images": "none"}),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(
    configure: Callable[..., Any], tiny: TinyStore, name: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ViSpecError, match=name):
        configure(tiny.sibling(), **settings)


def test_doctor_says_whether_a_draft_fits(
    tiny: TinyStore, changed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "run_checks", lambda **_: doctor.Report((), ok=True))
    target = ["doctor", "--target", str(tiny.target()), "--draft"]
    fits = CliRunner().invoke(app, [*target, tiny.sibling()])
    assert "yes, draft and target go together" in fits.stdout
    # 2 layers of one head, keys and values; features as wide as the model; in bfloat16.
    assert "256 bytes of KV cache for a token, and 192 bytes for a token of" in fits.stdout
    other = changed("config.json", _set(vision_config__patch_size=16))
    refused = CliRunner().invoke(app, [*target, other])
    assert refused.exit_code == 1
    assert "patch_size in vision_config is 16" in refused.stderr

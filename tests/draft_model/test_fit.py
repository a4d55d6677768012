"""A published model that does not fit is refused when the engine is configured, in one line."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.engine.test_bad_start import write_text_target
from tests.support.tiny_store import TinyStore
from vllm_vispec.cli import doctor
from vllm_vispec.cli.app import app
from vllm_vispec.heads.location import loaded_from_folder
from vllm_vispec.utils.errors import ViSpecError


@pytest.fixture(scope="module")
def configure(tiny: TinyStore) -> Callable[..., Any]:
    """Return ``configure(draft, **settings)``: an engine's configuration, with nothing loaded."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_vispec.plugin import register

    register()

    def make(draft: str, engine: dict[str, Any] | None = None, **settings: Any) -> Any:
        options: dict[str, Any] = {"model": str(tiny.target()), "max_model_len": 256}
        args = EngineArgs(
            **options | {"enforce_eager": True} | (engine or {}),
            speculative_config={
                "method": "vispec",
                "model": draft,
                "num_speculative_tokens": 4,
                **settings,
            },
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


def test_a_text_model_sees_no_images(configure: Callable[..., Any], tiny: TinyStore) -> None:
    config = configure(tiny.text_model())
    assert config.additional_config["vispec"]["images"] == "none"
    with pytest.raises(ViSpecError, match='images="all" does not go with a text model'):
        configure(tiny.text_model(), images="all")


@pytest.mark.parametrize("images", ["prune", "prune:0", "pool:4097", "conv:3", 4])
def test_unknown_shares_of_images_are_refused(
    configure: Callable[..., Any], tiny: TinyStore, images: Any
) -> None:
    with pytest.raises(ViSpecError, match=f'images={images!r} must be "all", "none", "prune:N"'):
        configure(tiny.sibling(), images=images)


@pytest.mark.parametrize(
    ("images", "seen"),
    [
        ("all", "the draft sees all image rows"),
        ("none", "the draft sees no images"),
        ("prune:4", "the draft sees 1 of 4 image rows"),
        ("pool:3", "the draft sees 1 of 3 image rows, their mean"),
    ],
)
def test_the_log_says_what_the_draft_sees(
    configure: Callable[..., Any],
    tiny: TinyStore,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    images: str,
    seen: str,
) -> None:
    configure(tiny.sibling())  # with the first one vLLM sets up loggers anew
    ours = logging.getLogger("vllm.vllm_vispec")
    monkeypatch.setattr(ours, "handlers", [caplog.handler])
    configure(tiny.sibling(), images=images)
    assert seen in caplog.text
    assert ": published model, 2 layers of width 96" in caplog.text


def test_heads_have_no_setting_of_images(configure: Callable[..., Any], tiny: TinyStore) -> None:
    with pytest.raises(ViSpecError, match="images goes with a published model"):
        configure(tiny.head(), images="none")


def test_other_families_are_refused(configure: Callable[..., Any], tiny: TinyStore) -> None:
    with pytest.raises(ViSpecError, match="family qwen3_vl, the target of qwen2_5_vl"):
        configure(tiny.sibling("qwen3_vl"))


def _swap_tokens(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


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
        ("config.json", _set(text_config__attention_chunk_size=64), "other than full attention"),
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


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("config.json", _set(text_config__vocab_size=4096)),
        # Which layers of a tower see a window, and how wide it is, is the tower's own business.
        (
            "config.json",
            _set(vision_config__window_size=28, vision_config__fullatt_block_indexes=[]),
        ),
        # Older libraries leave out what is as usual.
        (
            "processor_config.json",
            lambda content: [
                content["image_processor"].pop(f"do_{do}") for do in ("rescale", "normalize")
            ],
        ),
    ],
    ids=["longer table", "other windows", "older processor"],
)
def test_what_siblings_may_differ_in(
    configure: Callable[..., Any],
    changed: Callable[..., str],
    name: str,
    edit: Callable[[dict[str, Any]], None],
) -> None:
    assert configure(changed(name, edit))


def _rename(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)


def _shard(folder: Path) -> None:
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    _rename(folder, weight_map["a"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: _rename(folder, "pytorch_model.bin"), "holds only pickle weights"),
        (_shard, "lacks model-00002-of-00002.safetensors, which model.safetensors.index.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no \*.safetensors in"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (
            lambda folder: (folder / "processor_config.json").unlink(),
            "it has no preprocessor_config.json or processor_config.json, .*: download it again",
        ),
    ],
    ids=["pickles", "a shard is missing", "no weights", "an adapter of LoRA", "no processor"],
)
def test_incomplete_folders_are_refused(
    configure: Callable[..., Any],
    tiny: TinyStore,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    folder = shutil.copytree(tiny.sibling(), tmp_path / "spoilt")
    spoil(folder)
    with pytest.raises(ViSpecError, match=message) as caught:
        configure(str(folder))
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_fetched_are_refused(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("401 Client Error: the repository is gated")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ViSpecError, match=r"could not be fetched .* check the name, your network"):
        configure("Qwen/Qwen2.5-VL-3B-Instruct")


def test_too_little_memory_is_one_line(tiny: TinyStore) -> None:
    draft = SimpleNamespace(model=tiny.sibling(), revision=None)
    message = (
        r"sibling\S+ does not fit into the memory that the target left \(CUDA out of memory.\)"
    )
    with pytest.raises(ViSpecError, match=message) as caught, loaded_from_folder(draft):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it.")
    assert "\n" not in str(caught.value)
    assert draft.model == tiny.sibling()


def test_text_targets_are_refused(
    configure: Callable[..., Any], tiny: TinyStore, tmp_path: Path
) -> None:
    write_text_target(tmp_path / "text", tiny.target())
    with pytest.raises(
        ViSpecError, match=r"takes no images; use vLLM.s own .method.: .draft_model."
    ):
        configure(tiny.sibling(), {"model": str(tmp_path / "text")})


def test_a_quantised_draft_needs_a_dtype_that_its_method_has(
    configure: Callable[..., Any], changed: Callable[..., str]
) -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    draft = changed("config.json", _set(quantization_config=awq))
    with pytest.raises(ViSpecError, match=r"torch.float32 is not supported for .* awq"):
        configure(draft, {"dtype": "float32"})


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


def test_heads_of_the_tower_must_divide_among_ranks(
    configure: Callable[..., Any], changed: Callable[..., str]
) -> None:
    heads = {
        "text_config__num_attention_heads": 2,
        "text_config__num_key_value_heads": 2,
        "vision_config__num_heads": 3,
    }
    draft, engine = changed("config.json", _set(**heads)), {"tensor_parallel_size": 2}
    with pytest.raises(ViSpecError, match="the 3 attention heads of the draft's vision tower"):
        configure(draft, engine)
    configure(draft, engine | {"mm_encoder_tp_mode": "data"})


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("prompts with embeddings", {"enable_mm_embeds": True}),
        ("prompts with embeddings", {"enable_prompt_embeds": True}),
        ("mm_encoder_only", {"mm_encoder_only": True}),
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
    monkeypatch.setattr(doctor, "run_checks", lambda **_: doctor.Report([], ok=True))
    target = ["doctor", "--target", str(tiny.target()), "--draft"]
    fits = CliRunner().invoke(app, [*target, tiny.sibling()])
    assert "yes, draft and target go together" in fits.stdout
    # 2 layers of one head, keys and values; features as wide as the model; in bfloat16.
    assert "256 bytes of KV cache for a token, and 192 bytes for a token of" in fits.stdout
    assert "tensor parallel up to 1 (1)" in fits.stdout
    assert f'"model":"{tiny.sibling()}"' in fits.stdout
    assert fits.exit_code == 0
    itself = CliRunner().invoke(app, [*target, str(tiny.target())])
    assert "yes, but the draft has" in itself.stdout
    assert (
        "a token, and sees no images"
        in CliRunner().invoke(app, [*target, tiny.text_model()]).stdout
    )
    other = changed("config.json", _set(vision_config__patch_size=16))
    refused = CliRunner().invoke(app, [*target, other])
    assert refused.exit_code == 1
    assert "patch_size in vision_config is 16" in refused.stderr
    alone = CliRunner().invoke(app, ["doctor", "--draft", tiny.sibling()])
    assert (alone.exit_code, "give --target, too" in alone.stderr) == (1, True)
    head = CliRunner().invoke(app, [*target, tiny.head()])
    assert (head.exit_code, "is it a --head?" in head.stderr) == (1, True)


def test_doctor_knows_how_long_prompts_will_be(
    tiny: TinyStore, changed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "run_checks", lambda **_: doctor.Report([], ok=True))
    short = changed("config.json", _set(text_config__max_position_embeddings=128))
    asked = ["doctor", "--target", str(tiny.target()), "--draft", short]
    refused = CliRunner().invoke(app, asked)
    assert "reads 128 tokens at most; set --max-model-len to that" in refused.stderr
    fits = CliRunner().invoke(app, [*asked, "--max-model-len", "128"])
    assert fits.stdout.rstrip().endswith("--max-model-len 128"), fits.output


def test_deepstack_keeps_more_of_an_image(tiny: TinyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run_checks", lambda **_: doctor.Report([], ok=True))
    kind = "qwen3_vl"
    asked = ["doctor", "--target", str(tiny.target(kind)), "--draft", tiny.sibling(kind)]
    # The features of two layers beside the last; in bfloat16.
    assert "576 bytes for a token of a cached image" in CliRunner().invoke(app, asked).stdout

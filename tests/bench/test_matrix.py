"""Settings of a matrix, the order of its cells, its variants and schedules of K."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bench.fakes import HEAD, SETTINGS, TARGET
from vllm_vispec.bench.heads import plain_eagle_head, target_embedding, zeroed_head
from vllm_vispec.bench.matrix import NGRAM, VARIANTS
from vllm_vispec.bench.questions import find_side, samples_for
from vllm_vispec.bench.schedules import SETTING, as_schedule, merged_ranges
from vllm_vispec.bench.schema import BenchSample
from vllm_vispec.data.types import Part, Turn
from vllm_vispec.utils.errors import ViSpecError

RANGES = ((1, 4, 5), (5, 16, 0))


def test_variants_follow_each_other_and_take_turns_to_be_first() -> None:
    settings = SETTINGS.replace(concurrency=(1, 2), repetitions=2)
    ((_, visits),) = settings.groups()
    order = [(number, key.concurrency, key.variant) for key, number in visits]
    assert order == [
        (0, 1, "plain"),
        (0, 1, "vispec"),
        (0, 2, "vispec"),
        (0, 2, "plain"),
        (1, 1, "vispec"),
        (1, 1, "plain"),
        (1, 2, "plain"),
        (1, 2, "vispec"),
    ]


def test_a_star_varies_one_axis_at_a_time() -> None:
    settings = SETTINGS.replace(
        design="star",
        concurrency=(2, 1, 4),
        num_speculative_tokens=(5, 3),
        temperatures=(0.0, 1.0),
        image_tokens=(-1, 0, 64),
        repetitions=1,
    )
    groups = dict(settings.groups())
    found = {
        k: [
            (key.concurrency, key.temperature, key.image_tokens)
            for key, _ in visits
            if key.variant == "plain"
        ]
        for k, visits in groups.items()
    }
    base = (2, 0.0, -1)
    assert found[3] == [base]
    assert found[5][0] == base
    assert set(found[5]) == {
        base,
        (1, 0.0, -1),
        (4, 0.0, -1),
        (2, 1.0, -1),
        (2, 0.0, 0),
        (2, 0.0, 64),
    }
    assert len(groups[5]) == 2 * len(set(found[5])) == 2 * len(found[5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": ("plain", "medusa")}, "--variants: medusa is unknown.*ngram"),
        ({"variants": ("plain", "plain")}, "--variants names a value twice"),
        ({"variants": ()}, "--variants has no value"),
        ({"head": None}, "vispec needs --head"),
        ({"variants": ("eagle",)}, "eagle needs --eagle-head"),
        ({"concurrency": (0,)}, "--concurrency is 0: give more than 0"),
        ({"num_speculative_tokens": (33,)}, "--num-speculative-tokens is 33: give at most 32"),
        ({"temperatures": (-1.0,)}, "--temperatures is -1"),
        ({"image_tokens": (-2,)}, "--image-tokens is -2"),
        ({"repetitions": 0}, "--repetitions is 0"),
        ({"waves": 0}, "--waves is 0: give more than 0"),
        ({"least": 0}, "--least is 0: give more than 0"),
        ({"variants": ("vispec_tuned",)}, "vispec_tuned needs --schedule"),
        ({"variants": ("spec_llava:1.0",)}, "spec_llava:1.0 is unknown: .* like spec_llava:0.3"),
        (
            {"variants": ("entropy:0.1",), "num_speculative_tokens": (0, 1)},
            "entropy:0.1 drafts 2 to 16 tokens: give such a K",
        ),
        ({"schedule": ((2, 4, 1),)}, "does not begin at 1"),
        ({"design": "spiral"}, "--design is 'spiral': use one of full, star"),
    ],
)
def test_impossible_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ViSpecError, match=message):
        SETTINGS.replace(**change)


def test_speculative_configs(tmp_path: Path) -> None:
    more = {"draft_vocab": 5}
    settings = SETTINGS.replace(
        eagle_head="org/eagle-head",
        schedule=RANGES,
        sibling="org/sibling",
        speculative_config=more,
    )
    found = {name: one.speculative_config(settings, tmp_path, 5) for name, one in VARIANTS.items()}
    k = {"num_speculative_tokens": 5}
    tuned = {SETTING: [list(entry) for entry in RANGES]}
    # K that are compared stay what they are.
    fixed = {"method": "vispec", "adaptive": False, **k}
    sibling = fixed | {"model": "org/sibling"}
    served = {"method": "vispec", "model": str(HEAD), **k, **more}
    random = {"method": "vispec", "model": str(tmp_path / "vispec_random"), **k}
    assert found == {
        "plain": None,
        "ngram": NGRAM | k,
        "eagle": {"method": "eagle", "model": "org/eagle-head", **k},
        "vispec_zeroed": fixed | {"model": str(tmp_path / "vispec_zeroed")},
        "vispec": served | {"adaptive": False},
        "vispec_adaptive": served,
        "vispec_random": random,
        "vispec_tuned": served | {"adaptive": False} | tuned,
        "sibling": sibling,
        "sibling_prune": {**sibling, "images": "prune:4"},
        "sibling_none": {**sibling, "images": "none"},
    }


def test_zeroed_head_ignores_images_and_keeps_the_rest(tmp_path: Path) -> None:
    import torch

    from vllm_vispec.heads.folder import load_draft

    zeroed = load_draft(zeroed_head(str(HEAD), tmp_path / "zeroed"))
    whole = load_draft(HEAD)
    size = whole.config.hidden_size
    image, inputs = torch.randn(9, size), torch.randn(3, 3, size)
    with torch.no_grad():
        assert not zeroed.adaptor(image).any()
        assert whole.adaptor(image).any()
        assert torch.equal(zeroed.layer_input(*inputs), whole.layer_input(*inputs))


def test_text_head_becomes_a_plain_eagle_head(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from vllm_vispec.heads.export import write_json, write_weights
    from vllm_vispec.heads.folder import inspect_head
    from vllm_vispec.reference import ViSpecDraft

    config = inspect_head(HEAD).config
    config = replace(config, compress=False, global_feature=False, has_embed_tokens=False)
    source = tmp_path / "text"
    source.mkdir()
    draft = ViSpecDraft(config)
    write_weights(source, draft.state_dict().items(), "float32")
    write_json(source / "config.json", draft.config.to_config_json("float32"))
    folder = Path(plain_eagle_head(str(source), str(TARGET), tmp_path / "eagle"))
    written = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert "vispec" not in written
    assert "fc.bias" not in tensors
    assert "layers.0.self_attn.q_proj.weight" in tensors
    embedding = target_embedding(str(TARGET), (config.vocab_size, config.hidden_size))
    hidden = torch.zeros(config.vocab_size, config.hidden_size)
    expected = draft.layer_input(embedding.float(), hidden, hidden)
    found = torch.cat((tensors["embed_tokens.weight"], hidden), dim=1) @ tensors["fc.weight"].T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def squares(side: int) -> int:
    """Tokens of an image in a target with tokens of 28 x 28 pixels and at most 400 of them."""
    return min(max(round(side / 28) ** 2, 4), 400)


def test_side_of_an_image() -> None:
    assert find_side(64, squares) == 8 * 28
    assert find_side(1, lambda side: 1) == 28
    with pytest.raises(ViSpecError, match=r"--image-tokens: .* 400 tokens where 1024"):
        find_side(1024, squares)


def question(name: str, *images: str) -> BenchSample:
    parts = (*(Part(image=image) for image in images), Part("What is there?"))
    return BenchSample(name, "family", (Turn("user", parts),), 8)


def test_images_of_cells(tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.new("RGB", (30, 20)).save(picture)
    samples = [question("none"), question("one", str(picture))]
    samples.append(question("two", str(picture), str(picture)))
    as_they_are = samples_for(samples, -1, squares, tmp_path)
    assert list(as_they_are) == samples
    bare = samples_for(samples, 0, squares, tmp_path)
    assert [sample.sample_id for sample in bare] == ["one", "two"]
    assert not any(sample.images for sample in bare)
    sized = samples_for(samples, 128, squares, tmp_path / "images")
    sizes = [[Image.open(image).size for image in sample.images] for sample in sized]
    assert [[squares(side) for side, _ in found] for found in sizes] == [[121], [64, 64]]
    with pytest.raises(ViSpecError, match="no sample of the dataset has an image"):
        samples_for(samples[:1], 64, squares, tmp_path)


TEXT = "[[1, 4, 5], [5, 16, 0]]"


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        json.dumps({"schedule": RANGES, "speculative_config": {}}),
        json.dumps({"method": "vispec", "num_speculative_tokens": 5, SETTING: RANGES}),
    ],
)
def test_forms_that_are_read(text: str, tmp_path: Path) -> None:
    assert as_schedule(text) == RANGES
    file = tmp_path / "tune.json"
    file.write_text(text)
    assert as_schedule(str(file)) == RANGES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.json", "nowhere.json cannot be read"),
        ("[1, 2", "is not JSON"),
        ("{}", "is not a list of ranges"),
        ("[[1, 4]]", "is not a list of ranges"),
        ("[[1, 4, true]]", "is not a list of ranges"),
        ("[[1, 4, -1]]", "is not a list of ranges"),
        ("[[4, 1, 2]]", "is not a list of ranges"),
        ("[[2, 4, 3]]", "does not begin at 1"),
        ("[[1, 4, 3], [4, 8, 1]]", "overlaps"),
        ("[[1, 4, 0]]", "drafts at no batch size"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ViSpecError, match=message):
        as_schedule(text)


def test_merged_ranges() -> None:
    chosen = [(1, 5), (2, 5), (4, 3), (16, 0)]
    assert merged_ranges(chosen) == ((1, 3, 5), (4, 15, 3), (16, 16, 0))
    assert merged_ranges(chosen, midway=True) == ((1, 2, 5), (3, 7, 3), (8, 16, 0))
    assert merged_ranges([(8, 2)]) == ((1, 8, 2),)

"""One pair of image bounds for the whole pipeline: chosen by the target, refused if it differs."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import random_image
from tests.support.tiny_store import TinyStore
from tests.train.runs import recipe, run, write_dialogues, write_records
from vllm_vispec.data.encode import Encoded, Encoder
from vllm_vispec.data.image_bounds import recorded_bounds, set_bounds
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import Conversation, Part, Rejected, Turn
from vllm_vispec.evaluate.options import EvalOptions
from vllm_vispec.evaluate.run import image_bounds
from vllm_vispec.train.data import count_reasons
from vllm_vispec.utils.errors import ViSpecError

UNIT = 28 * 28
PUBLISHED = {"shortest_edge": 4 * UNIT, "longest_edge": 16384 * UNIT}
"""Of Qwen2.5-VL's preprocessor_config.json."""


def published(tiny: TinyStore) -> Any:
    """A processor with the bounds of Qwen2.5-VL as published."""
    found = load_processor(tiny.target("qwen2_5_vl"))
    found.image_processor.size = type(found.image_processor.size)(**PUBLISHED)
    return found


def look(*images: str) -> Conversation:
    parts = (*(Part(image=name) for name in images), Part("What?"))
    return Conversation("s", (Turn("user", parts), Turn("assistant", (Part("A cat."),))))


def test_published_processors_get_vispecs_bounds_and_others_keep_their_own(tiny: TinyStore) -> None:
    wide = {"min_pixels": 256 * UNIT, "max_pixels": 1280 * UNIT}
    assert set_bounds(published(tiny), {}) == wide
    assert set_bounds(published(tiny), {"max_pixels": 500 * UNIT})["max_pixels"] == 500 * UNIT
    own = load_processor(tiny.target("qwen2_5_vl"))
    assert set_bounds(own, {}) == {"min_pixels": 4 * UNIT, "max_pixels": 16 * UNIT}
    fixed = load_processor(tiny.target("llava"))
    assert set_bounds(fixed, {}) == {}
    with pytest.raises(
        ViSpecError, match=r"max_pixels: the target's processor .* fixed size: drop"
    ):
        set_bounds(fixed, {"max_pixels": 1000})
    with pytest.raises(
        ViSpecError, match="are no bounds: give the smaller one first, at least 784"
    ):
        set_bounds(own, {"min_pixels": 20 * UNIT})


def test_photos_are_scaled_and_what_cannot_be_read_is_counted(
    tiny: TinyStore, tmp_path: Path
) -> None:
    """A photo of 50 megapixels has 1,280 tokens; one that could exhaust the memory is refused."""
    processor = published(tiny)
    set_bounds(processor, {})
    random_image(0, (100, 80)).resize((8192, 6144)).save(tmp_path / "photo.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "photo.jpg").read_bytes()[:5000])
    # A PNG's header alone says how large it is.
    random_image(1, (10, 10)).save(tmp_path / "bomb.png")
    content = bytearray((tmp_path / "bomb.png").read_bytes())
    content[16:24] = (20_000).to_bytes(4) + (20_000).to_bytes(4)
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4)
    (tmp_path / "bomb.png").write_bytes(content)
    random_image(2, (28 * 300, 28)).save(tmp_path / "thread.png")
    encoder = Encoder(processor, 2400, tmp_path)
    photo = encoder(look("photo.jpg"))
    assert isinstance(photo, Encoded)
    ((start, end),) = photo.runs
    assert 1200 < end - start <= 1280
    bad = [encoder(look(name)) for name in ("cut.jpg", "bomb.png", "thread.png")]
    bad.append(encoder(look("photo.jpg", "photo.jpg")))
    assert all(isinstance(item, Rejected) and "\n" not in item.reason for item in bad)
    reasons = count_reasons(item for item in bad if isinstance(item, Rejected))
    assert {name: entry["count"] for name, entry in reasons.items()} == {
        "unreadable image": 2,
        "image too narrow": 1,
        "images longer than data.max_length: lower max_pixels": 1,
    }


def test_regenerate_fixes_them_before_the_engine_starts(tiny: TinyStore, tmp_path: Path) -> None:
    target = str(tiny.target("qwen2_5_vl"))
    asked = RegenerateSettings(input=tmp_path, output=tmp_path, target=target, max_pixels=9 * UNIT)
    settings = asked.with_image_bounds()
    assert settings.image_bounds == {"min_pixels": 4 * UNIT, "max_pixels": 9 * UNIT}
    assert settings.fingerprint()["max_pixels"] == 9 * UNIT
    sized = asked.model_copy(update={"engine": {"mm_processor_kwargs": {"max_pixels": 9}}})
    with pytest.raises(ViSpecError, match="--engine sets max_pixels of mm_processor_kwargs"):
        sized.with_image_bounds()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dialogues whose records say that images had at most 6 tokens."""
    data = write_dialogues(tmp_path_factory.mktemp("answers"), 12)
    made = {"min_pixels": 4 * UNIT, "max_pixels": 6 * UNIT}
    return write_records(data, [json.loads(x) | made for x in data.read_text().splitlines()])


def test_one_value_from_the_answers_to_the_served_head(
    tiny: TinyStore, answers: Path, tmp_path: Path
) -> None:
    target = tiny.target("qwen2_5_vl")
    run(recipe(target, answers, tmp_path / "run", schedule__max_steps=1))
    (counted,) = (tmp_path / "cache").glob("*/lengths-*.json")
    # Two images, one of them larger than that.
    assert max(one["image_tokens"] for one in json.loads(counted.read_text()).values()) <= 2 * 6
    head = tmp_path / "run" / "head"
    noted = json.loads((head / "provenance.json").read_text())["config"]["data"]
    assert (noted["min_pixels"], noted["max_pixels"]) == (4 * UNIT, 6 * UNIT)
    flag = f'--mm-processor-kwargs \'{{"min_pixels":{4 * UNIT},"max_pixels":{6 * UNIT}}}\''
    assert (head / "README.md").read_text().count(flag) == 2
    with pytest.raises(ViSpecError, match=r"answers made with .*max_pixels 4704, the settings are"):
        run(recipe(target, answers, tmp_path / "other", data__max_pixels=12 * UNIT))
    # Evaluation reads images as the head was trained.
    plain = write_dialogues(tmp_path, 3)
    options = EvalOptions(target=str(target), head=str(head), data=plain)
    assert image_bounds(options) == {"min_pixels": 4 * UNIT, "max_pixels": 6 * UNIT}
    changed = [json.loads(line) | {"max_pixels": 16 * UNIT} for line in plain.open()]
    options = options.model_copy(update={"data": write_records(tmp_path / "other.jsonl", changed)})
    with pytest.raises(
        ViSpecError, match=r"max_pixels 12544, --head .* was trained with .*--max-p"
    ):
        image_bounds(options)
    given = options.model_copy(update={"max_pixels": 16 * UNIT})
    assert image_bounds(given) == {"max_pixels": 16 * UNIT}


def test_answers_of_two_sizes_do_not_mix() -> None:
    made = [
        Conversation(n, look("a").turns, "", {"max_pixels": p}) for n, p in (("a", 5), ("b", 6))
    ]
    with pytest.raises(ViSpecError, match=r"max_pixels 5 of sample a, max_pixels 6 of b"):
        recorded_bounds(made, "data.train")
    words = Conversation("c", look("a").turns, "", {"max_pixels": "many"})
    with pytest.raises(ViSpecError, match=r"data.train: .* of sample c is no whole number"):
        recorded_bounds([words], "data.train")
    silent = Conversation("c", look("a").turns)
    with pytest.raises(
        ViSpecError, match=r"max_pixels 5 \(sample a\), and some .* \(sample c\): set"
    ):
        recorded_bounds([made[0], silent], "data.train")
    assert recorded_bounds([made[0], silent], "data.train", {"max_pixels": 5}) == {"max_pixels": 5}

"""The encoder on the processors of all four target families."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.more_families import TRAINED
from tests.support.tiny_families import FAMILIES
from tests.support.tiny_store import TinyStore
from vllm_vispec.data.encode import Encoded, Encoder, Measured
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import Conversation, Part, Rejected, Turn
from vllm_vispec.utils.errors import ViSpecError

KINDS = tuple(FAMILIES)


@lru_cache(maxsize=8)
def processor(folder: Path) -> Any:
    return load_processor(folder)


def user(*parts: Part) -> Turn:
    return Turn("user", parts)


def answer(text: str) -> Turn:
    return Turn("assistant", (Part(text=text),))


def two_turns(**extra: Any) -> Conversation:
    return Conversation(
        "s",
        (
            Turn("system", (Part(text="Be kind."),)),
            user(Part(image="a.png"), Part(text="What is it?")),
            answer("A red square."),
            user(Part(text="And these? "), Part(image="b.png"), Part(image="wide.png")),
            answer("A star  and a line"),
        ),
        "vqa",
        extra,
    )


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def encoder(kind: str, tiny: TinyStore, pictures: Path) -> Encoder:
    return Encoder(processor(tiny.target(kind)), 1000, pictures)


def encode(encoder: Encoder, conversation: Conversation) -> Encoded:
    found = encoder(conversation)
    assert isinstance(found, Encoded), found
    return found


def spoken(encoder: Encoder, encoded: Encoded) -> str:
    return str(encoder.template.tokenizer.decode(encoded.token_ids[encoded.answer]))


def test_measured_without_pixels(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = encode(encoder, two_turns())
    tokens = Measured(len(encoded.token_ids), sum(end - start for start, end in encoded.runs))
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "_process", lambda *_: pytest.fail("pixels were processed"))
        assert encoder.measure(two_turns()) == tokens
    monkeypatch.delattr(type(encoder.processor), "_get_num_multimodal_tokens")
    assert encoder.measure(two_turns()) == tokens


def test_mask_holds_exactly_the_answers(encoder: Encoder, kind: str) -> None:
    encoded = encode(encoder, two_turns())
    expected = {
        True: "A red square.<|im_end|>A star  and a line<|im_end|>",
        False: " A red square. A star  and a line",
    }
    assert spoken(encoder, encoded) == expected["qwen" in kind]
    assert encoded.answer[-1]
    assert encoded.token_ids.dtype == torch.int64
    assert encoded.answer.dtype == torch.bool
    assert encoded.token_ids.shape == encoded.answer.shape
    assert encoded.family == "vqa"


@pytest.mark.parametrize("kind", TRAINED)
def test_ids_are_the_processors_own(encoder: Encoder, kind: str, pictures: Path) -> None:
    """Those of families whose image tokens have others around and between them, too."""
    from PIL import Image

    conversation = two_turns()
    encoded = encode(encoder, conversation)
    images = [Image.open(pictures / name) for name in ("a.png", "b.png", "wide.png")]
    text = encoder.template.render(conversation.turns)
    whole = encoder.processor(text=[text], images=images, return_tensors="pt")
    length = len(encoded.token_ids)
    assert torch.equal(whole["input_ids"][0, :length], encoded.token_ids)
    rest = encoder.template.tokenizer.decode(whole["input_ids"][0, length:])
    assert not rest.strip()
    for name, tensor in encoded.vision.items():
        assert torch.equal(tensor, whole[name])
    assert len(encoded.runs) == 3 or kind in ("mistral3", "idefics3", "smolvlm")
    inside = torch.zeros(length, dtype=torch.bool)
    for start, end in encoded.runs:
        assert end > start
        inside[start:end] = True
    assert torch.equal(inside, encoded.token_ids == encoder.image_token_id)
    assert not (inside & encoded.answer).any()


def test_images_that_touch_are_kept_apart(tiny: TinyStore, pictures: Path) -> None:
    """LLaVA's template without the line break after an image gives one stretch of tokens."""
    own = load_processor(tiny.target("llava_next"))
    own.chat_template = own.chat_template.replace("<image>\n", "<image>")
    encoder = Encoder(own, 1000, pictures)
    apart = encode(Encoder(processor(tiny.target("llava_next")), 1000, pictures), two_turns())
    encoded = encode(encoder, two_turns())
    assert [end - start for start, end in encoded.runs] == [b - a for a, b in apart.runs]
    assert encoded.runs[1][1] == encoded.runs[2][0]


def test_recorded_tokens_replace_the_last_answer(encoder: Encoder) -> None:
    tokens = encoder.template.tokenizer("A st", add_special_tokens=False).input_ids
    tokens += encoder.template.tokenizer("ar", add_special_tokens=False).input_ids
    conversation = two_turns(response_token_ids=[[9, 9], tokens])
    encoded = encode(encoder, conversation)
    assert encoded.token_ids[-len(tokens) :].tolist() == tokens
    assert encoded.answer[-len(tokens) :].all()
    text = spoken(encoder, encoded)
    assert "A red square." in text
    assert text.endswith("A star")
    plain = Encoder(encoder.processor, 1000, encoder.image_root, recorded=False)
    assert torch.equal(
        encode(plain, conversation).token_ids, encode(encoder, two_turns()).token_ids
    )


def test_an_answer_cut_off_has_no_end(tiny: TinyStore, pictures: Path) -> None:
    encoder = Encoder(processor(tiny.target("qwen2_5_vl")), 1000, pictures)
    encoded = encode(encoder, two_turns(finish_reason=["length", "length"]))
    assert spoken(encoder, encoded) == "A red square.A star  and a line"
    end = encoder.template.tokenizer.eos_token_id
    assert (encoded.token_ids == end).sum() == 4  # two questions, the system's, the first answer


def test_what_follows_the_last_answer_is_dropped_and_nothing_else(encoder: Encoder) -> None:
    base = two_turns()
    longer = Conversation("s", (*base.turns, user(Part(text="More"))), "vqa")
    token_ids = encode(encoder, base).token_ids
    assert torch.equal(encode(encoder, longer).token_ids, token_ids)
    length = len(token_ids)
    encoder.max_length = length
    assert isinstance(encoder(two_turns()), Encoded)
    encoder.max_length = length - 1
    assert encoder(two_turns()) == Rejected(
        "s", f"longer than max_length: {length} tokens, {length - 1} allowed"
    )


QUESTION = user(Part(image="a.png"), Part(text="What?"))
TOKENS = "response_token_ids"


@pytest.mark.parametrize(
    ("turns", "extra", "reason"),
    [
        ((QUESTION,), {}, "no answer"),
        ((answer("Yes"),), {}, "an answer without a question before it"),
        ((QUESTION, answer(" \n")), {}, "empty answer"),
        ((user(Part(image="none.png")), answer("Yes")), {}, "image none.png does not exist"),
        ((user(Part(image="cut.png")), answer("Yes")), {}, "image cut.png cannot be read"),
        ((QUESTION, answer("Yes"), QUESTION), {}, "an image without an answer after it"),
        ((QUESTION, Turn("assistant", (Part(image="a.png"),))), {}, "an answer holds an image"),
        ((QUESTION, answer("Yes")), {TOKENS: [[1], [2]]}, "is not one list for each of 1"),
        ((QUESTION, answer("Yes")), {TOKENS: [["a"]]}, "holds no token ids"),
    ],
)
def test_rejections(
    tiny: TinyStore, pictures: Path, turns: tuple[Turn, ...], extra: dict[str, Any], reason: str
) -> None:
    encoder = Encoder(processor(tiny.target("qwen2_5_vl")), 1000, pictures)
    found = encoder(Conversation("s", turns, extra=extra))
    assert isinstance(found, Rejected), found
    assert reason in found.reason
    assert "\n" not in found.reason


def test_text_without_images(encoder: Encoder, kind: str) -> None:
    encoded = encode(encoder, Conversation("t", (user(Part(text="Hi")), answer("Yes"))))
    assert encoded.runs == ()
    assert dict(encoded.vision) == {}
    assert "Yes" in spoken(encoder, encoded)
    mark = FAMILIES[kind].image_token
    found = encoder(Conversation("s", (user(Part(text=f"Say {mark}")), answer("No"))))
    assert found == Rejected("s", "0 images, but the rendered dialogue has 1 image tokens")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("<|im_start|>{{ m['role'] }}\n", "{{ loop.length }}{{ m['role'] }}\n", "is no prefix"),
        ("{{ c['text'] }}", "{{ c['text'] | upper }}", "changes the text of an answer"),
        ("{% for m", "{{ raise_exception('no roles') }}{% for m", "chat template: no roles"),
    ],
)
def test_templates_that_do_not_round_trip(
    tiny: TinyStore, pictures: Path, old: str, new: str, reason: str
) -> None:
    own = load_processor(tiny.target("qwen2_5_vl"))
    assert old in own.chat_template
    own.chat_template = own.chat_template.replace(old, new, 1)
    found = Encoder(own, 1000, pictures)(two_turns())
    assert isinstance(found, Rejected)
    assert reason in found.reason


def test_targets_that_are_none(tmp_path: Path, tiny: TinyStore) -> None:
    with pytest.raises(ViSpecError, match="give the folder or hub id of a vision-language model"):
        load_processor(tmp_path / "none")
    text_only = tmp_path / "text"
    processor(tiny.target("qwen2_5_vl")).tokenizer.save_pretrained(text_only)
    with pytest.raises(ViSpecError, match="vision-language model"):
        load_processor(text_only)

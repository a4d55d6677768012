"""What is asked, what is stored, and whether the template gives the target's tokens back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_store import TinyStore
from vllm_vispec.data.encode import Encoder
from vllm_vispec.data.images import open_image
from vllm_vispec.data.regenerate.dialogue import Answer, Dialogue, ask, question_groups
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import Conversation, Part, Turn

SYSTEM = Turn("system", (Part(text="Be kind."),))
LOOK = Turn("user", (Part(image="a.png"), Part(text="What is it?")))
OLD = Turn("assistant", (Part(text="An old answer."),))
MORE = Turn("user", (Part(text="More?"),))
TALK = Conversation("s", (SYSTEM, LOOK, OLD, MORE, OLD), "vqa")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llava"])
def encoder(request: pytest.FixtureRequest, tiny: TinyStore, pictures: Path) -> Encoder:
    return Encoder(load_processor(tiny.target(request.param)), 1 << 20, pictures, recorded=False)


def reply(encoder: Encoder, dialogue: Dialogue, text: str, finish: str = "stop") -> Answer:
    """Return what an engine says whose tokens for the text are the tokenizer's."""
    tokenizer = encoder.template.tokenizer
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    images = [open_image(path, encoder.image_root) for path in dialogue.images]
    asked = encoder.template.render(dialogue.turns, open_answer=True)
    prompt = encoder.processor(text=[asked], images=images or None).input_ids[0]
    return Answer(text, finish, tuple(ids), tuple(prompt))


def own_space(encoder: Encoder) -> str:
    """The space before an answer: LLaVA's model writes it, Qwen's template has a line break."""
    return " " if "ASSISTANT" in encoder.processor.chat_template else ""


def test_answers_are_dropped_and_questions_kept_in_order() -> None:
    assert question_groups(TALK.turns) == [(SYSTEM, LOOK), (MORE,)]
    assert question_groups((LOOK, MORE, OLD)) == [(LOOK, MORE)]
    assert question_groups((OLD, LOOK)) == [(LOOK,)]
    for turns in ((), (SYSTEM,), (SYSTEM, OLD)):
        with pytest.raises(ValueError, match="no question"):
            question_groups(turns)


def test_the_request_joins_the_last_question() -> None:
    assert ask((SYSTEM, LOOK), "") == (SYSTEM, LOOK)
    _, asked = ask((SYSTEM, LOOK), "Be long.")
    assert asked.parts == (Part(image="a.png"), Part(text="What is it?\nBe long."))
    (picture,) = ask((Turn("user", (Part(image="a.png"),)),), "Be long.")
    assert picture.parts == (Part(image="a.png"), Part(text="Be long."))


def test_own_answers_are_the_context(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    dialogue = Dialogue.begin(TALK)
    assert dialogue.turns == (SYSTEM, LOOK)
    space = own_space(encoder)
    assert not dialogue.accept(reply(encoder, dialogue, space + "A star."), encoder.template)
    new = Turn("assistant", (Part(text="A star."),))
    assert dialogue.turns == (SYSTEM, LOOK, new, MORE)
    assert dialogue.images == ("a.png",)
    assert dialogue.accept(reply(encoder, dialogue, space + "Two  stars"), encoder.template)
    # The engine has processed the pixels; that is not done again.
    monkeypatch.setattr(Encoder, "_process", lambda *_: pytest.fail("pixels were processed"))
    done = dialogue.finish(encoder)
    assert done.round_trip is True, done.round_trip_reason
    assert done.conversation.sample_id == "s"
    assert done.conversation.family == "vqa"
    assert done.conversation.turns[-1].text == "Two  stars"
    assert len(done.answers) == 2


def test_an_answer_cut_off_round_trips(encoder: Encoder) -> None:
    dialogue = Dialogue.begin(Conversation("s", (LOOK,)))
    whole = reply(encoder, dialogue, own_space(encoder) + "A sta", "length")
    assert whole.token_ids is not None
    assert dialogue.accept(replace(whole, token_ids=whole.token_ids[:-1]), encoder.template)
    done = dialogue.finish(encoder)
    assert done.round_trip is True, done.round_trip_reason


def test_tokens_that_do_not_come_back(encoder: Encoder) -> None:
    """Sampled ones that the tokenizer would not choose, or a prompt that the engine saw else."""
    text = own_space(encoder) + "star"
    tokenizer = encoder.template.tokenizer
    letters = [tokenizer(c, add_special_tokens=False).input_ids[0] for c in text]
    usual = reply(encoder, Dialogue.begin(Conversation("s", (LOOK,))), text)
    assert usual.prompt_token_ids is not None
    cases: dict[str, dict[str, Any]] = {
        "other tokens for the same text": {"token_ids": (*letters, tokenizer.eos_token_id)},
        "the engine's prompt has other tokens than the encoder's": {
            "prompt_token_ids": usual.prompt_token_ids[1:]
        },
    }
    for reason, change in cases.items():
        dialogue = Dialogue.begin(Conversation("s", (LOOK,)))
        assert dialogue.accept(replace(usual, **change), encoder.template)
        done = dialogue.finish(encoder)
        assert (done.round_trip, done.round_trip_reason) == (False, reason)


def test_without_tokens_nothing_is_checked() -> None:
    dialogue = Dialogue.begin(Conversation("s", (LOOK,)))
    assert dialogue.accept(Answer(" A star. ", "stop"), None)
    done = dialogue.finish(None)
    assert done.round_trip is None
    assert done.conversation.turns[-1].text == "A star."


@pytest.mark.parametrize("reason", ["abort", "error", "None"])
def test_an_answer_that_the_engine_gave_up(reason: str) -> None:
    dialogue = Dialogue.begin(TALK)
    with pytest.raises(ValueError, match=f"ended with {reason}"):
        dialogue.accept(Answer("half", reason, (2,), (1,)), None)

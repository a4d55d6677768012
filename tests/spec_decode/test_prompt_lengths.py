"""Prompt lengths on the V2 runner: those of the prompts, also when answers were cut short."""

from __future__ import annotations

from types import SimpleNamespace

from vllm_vispec.spec_decode.prompt_lengths import PROMPTS_PER_REQUEST, PromptLengths


class State:
    """Stands for vLLM's model state."""

    def __init__(self) -> None:
        self.added: list[tuple[int, str]] = []

    def add_request(self, req_index: int, new_req_data: SimpleNamespace) -> None:
        self.added.append((req_index, new_req_data.req_id))


def test_added_requests_are_noted_and_passed_on() -> None:
    state, prompts = State(), PromptLengths(2)
    prompts.follow(state)
    state.add_request(1, SimpleNamespace(req_id="a", prompt_len=7))
    assert state.added == [(1, "a")]
    assert prompts.get("a") == 7
    assert prompts.get("dummy") == 0


def test_the_oldest_make_room() -> None:
    prompts = PromptLengths(1)
    for index in range(PROMPTS_PER_REQUEST):
        prompts.note(str(index), index + 1)
    prompts.note("0", 5)
    prompts.note("new", 9)
    assert prompts.get("0") == 5
    assert prompts.get("1") == 0
    assert prompts.get("new") == 9

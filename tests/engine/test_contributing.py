"""The engine test that CONTRIBUTING.md shows."""

from __future__ import annotations

import pytest

from tests.support.engine import StartEngine
from tests.support.runners import runners
from tests.support.tiny_store import TinyStore


@pytest.mark.parametrize("runner", runners("v1", "v2", slow=["v2"]))
def test_two_draft_tokens(engine: StartEngine, tiny: TinyStore, runner: str) -> None:
    prompts = ["A user shows a red square.", "How many stars are there?"]
    plain = engine(runner)
    drafting = engine(runner, draft=tiny.head(), num_draft_tokens=2)
    found = drafting.generate(prompts, max_tokens=20)
    assert [one.token_ids for one in found] == [
        one.token_ids for one in plain.generate(prompts, max_tokens=20)
    ]
    assert drafting.drafts() > 0
    assert drafting.acceptance() > 0.2

"""Prompts that another engine has prefilled: vLLM's ExampleConnector hands their keys over on disk.

The draft's keys come with the target's. The vision tower does not run where decoding is done, so
drafts behind an image may lack its global feature. No outcome may change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import StartEngine
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import Request, Served, drive_one_by_one, mixed_requests

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

# That connector wants whole blocks in front of the last token.
REQUESTS = [one for one in mixed_requests(KIND, 16, 24) if not one.name.startswith("end")]
FIRST_TOKENS = [Request(one.name, one.text, one.images, 1) for one in REQUESTS]


def test_prompts_from_elsewhere(engine: StartEngine, tiny: TinyStore, tmp_path: Path) -> None:
    options: dict[str, Any] = {"draft": tiny.head(), "num_draft_tokens": 4}

    def serve(role: str, requests: list[Request]) -> Served:
        connector = {
            "kv_connector": "ExampleConnector",
            "kv_role": role,
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
        }
        # A process has one connector; this one knows of prompts that no step splits.
        found = engine("v1", process=role, kv_transfer_config=connector, **options)
        return Served(found.run(drive_one_by_one, requests))

    alone = Served(engine("v1", **options).run(drive_one_by_one, REQUESTS))
    serve("kv_producer", FIRST_TOKENS)
    found = serve("kv_consumer", REQUESTS)
    assert found.outputs() == alone.outputs()
    # Text is drafted as in one engine, step by step: the draft's keys are there.
    long = [one.name for one in REQUESTS if one.name.startswith("long")]
    assert all(found.results[name][0].num_cached_tokens > 0 for name in long)
    for one in REQUESTS:
        if not one.images:
            assert found.accepted()[one.name] == alone.accepted()[one.name]

"""fp8 KV caches on CPU: chains answer as plain vLLM with the same cache does, masks and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.setups import params
from tests.support.child import ChildError, run_in_subprocess
from tests.support.runners import Runner
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
JOB = "tests.engine.lossless_jobs:serve"


def _setup(tiny: TinyStore, name: str, draft: bool, cache_dtype: str) -> dict[str, Any]:
    target, head = tiny.pair(KIND, dialect="canonical")
    options = {
        "model": target,
        "draft": head if draft else None,
        "num_draft_tokens": 4,
        "extra": {"kv_cache_dtype": cache_dtype},
    }
    return {"name": name, "kind": KIND, "options": options, "scenarios": {"mixed": {"count": 16}}}


def _accepted(results: dict[str, Any]) -> int:
    return sum(sum(item["accepted_draft"]) for items in results.values() for item in items)


@pytest.mark.parametrize("runner", params("v1", "v2", "v1-overlay", slow=["v2"]))
def test_chains(tiny: TinyStore, runner: Runner) -> None:
    setups = [
        _setup(tiny, "plain", False, "fp8"),
        _setup(tiny, "chain", True, "fp8"),
        _setup(tiny, "exact", True, "auto"),
    ]
    if not torch.cpu._is_avx512_supported():
        with pytest.raises(ChildError, match=r"AVX-512|not supported by the CPU attention"):
            run_in_subprocess(JOB, {"setups": setups}, runner.env())
        return
    plain, chain, exact = (
        item["results"] for item in run_in_subprocess(JOB, {"setups": setups}, runner.env())
    )
    ids = [
        {name: [item["token_ids"] for item in items] for name, items in results.items()}
        for results in (plain, chain)
    ]
    assert ids[1] == ids[0]
    # Images are masked as with an exact cache: a draft that saw them would be refused more often.
    assert _accepted(chain) > 0.85 * _accepted(exact)

"""Engine settings that the engine tests share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.support.child import run_in_subprocess
from tests.support.runners import Runner, runner_params

Served = dict[tuple[str, str], dict[str, Any]]

SMALL: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 48,
    # Random models would fill their JSON with blanks.
    "extra": {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}},
}
"""A token budget that splits most images; requests wait for their turn."""

FEW_BLOCKS: dict[str, Any] = SMALL | {"max_num_batched_tokens": 96, "num_blocks": 10}
"""A KV cache of 9 usable blocks of 32 tokens: requests preempt each other."""

BUSY: dict[str, Any] = {"busy": {"run": "mixed", "count": 20, "max_tokens": 40}}
"""The scenario in which they do, on V1."""


def params(*names: str, slow: Sequence[str] = ()) -> list[pytest.ParameterSet]:
    """Return the runners ``names`` as parameters; those in ``slow`` stay out of the default set."""
    chosen = {str(param.id): param for param in runner_params() if param.id in names}
    return [
        pytest.param(*param.values, id=name, marks=[*param.marks, pytest.mark.slow])
        if name in slow
        else param
        for name, param in chosen.items()
    ]


def setup(
    name: str, kind: str, options: Mapping[str, Any], scenarios: Mapping[str, Any]
) -> dict[str, Any]:
    """Return one setup for :func:`tests.engine.lossless_jobs.serve`."""
    return {"name": name, "kind": kind, "options": dict(options), "scenarios": dict(scenarios)}


def serve(runner: Runner, setups: list[dict[str, Any]], timeout: float = 1500) -> Served:
    """Serve ``setups`` in one child process; what was served by (setup, scenario)."""
    items = run_in_subprocess(
        "tests.engine.lossless_jobs:serve", {"setups": setups}, runner.env(), timeout
    )
    return {(item["setup"], item["scenario"]): item for item in items}


def outputs(served: Mapping[str, Any]) -> dict[str, list[tuple[list[int], str, str]]]:
    """Return ids, text and finish reason of every sequence by request."""
    return {
        name: [(item["token_ids"], item["text"], item["finish_reason"]) for item in sequences]
        for name, sequences in served["results"].items()
    }


def accepted(served: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    """Return the accepted draft tokens of every round by request."""
    return {
        name: [item["accepted_draft"] for item in sequences]
        for name, sequences in served["results"].items()
    }


def mean_accepted(served: Mapping[str, Any]) -> float:
    """Return ``accepted_draft`` over all rounds of all requests."""
    rounds = [n for rows in accepted(served).values() for row in rows for n in row]
    return sum(rounds) / len(rounds) if rounds else 0.0


def assert_same(plain: Mapping[str, Any], speculative: Mapping[str, Any]) -> None:
    """Same outputs, and the drafts took part."""
    expected, found = outputs(plain), outputs(speculative)
    wrong = {
        name: (expected[name], found.get(name)) for name in found if expected[name] != found[name]
    }
    assert not wrong
    assert speculative["metrics"]["vllm:spec_decode_num_drafts"] > 0

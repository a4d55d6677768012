"""Draft trees reproduce every golden case: output ids and the acceptance of every round."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.child import run_in_subprocess
from tests.support.golden import GoldenCase, golden_dir, load_cases
from tests.support.runners import Runner, runner_params

CASES = load_cases()
Results = dict[str, dict[str, Any]]

pytestmark = [pytest.mark.golden, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", params=runner_params())
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Serve all cases with one runner (one child process, one engine per target and draft)."""
    runner: Runner = request.param
    items = run_in_subprocess(
        "tests.support.golden_jobs:serve_tree_cases",
        {"cases_dir": str(golden_dir()), "work_dir": str(tmp_path_factory.mktemp("golden"))},
        env=runner.env(),
        timeout=1500,
    )
    return {item["name"]: item for item in items}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_tree(served: Results, case: GoldenCase) -> None:
    """Greedy ids equal the recorded ones; so does the acceptance of every recorded round."""
    found = served[case.name]
    assert "error" not in found, found["error"]
    assert found["token_ids"] == case.greedy_ids
    recorded = case.tree_accept_lengths
    assert found["accepted_draft"][: len(recorded)] == recorded


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_tree_rounds_fit(case: GoldenCase) -> None:
    """The recorded rounds end before the greedy ids do, so that every round is compared."""
    emitted = sum(accepted + 1 for accepted in case.tree_accept_lengths)
    assert emitted <= len(case.greedy_ids)

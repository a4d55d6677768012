"""Bad input at start: every case is refused in one line that names the setting and the remedy."""

from __future__ import annotations

import re

import pytest

from tests.engine.bad_starts import BAD_STARTS
from tests.support.child import run_in_subprocess
from vllm_vispec.compat.check import version_problem

Results = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Try all starts in one child process."""
    folder = str(tmp_path_factory.mktemp("bad-start"))
    items = run_in_subprocess("tests.engine.bad_starts:try_all", {"folder": folder})
    return {item["name"]: item for item in items}


@pytest.mark.engine
@pytest.mark.parametrize("name", BAD_STARTS)
def test_refused(refusals: Results, name: str) -> None:
    case, found = BAD_STARTS[name], refusals[name]
    assert found["error"] == case.error, found["message"]
    assert re.search(case.message, found["message"]), found["message"]
    if case.error == "ViSpecError":
        assert "\n" not in found["message"]


@pytest.mark.engine
@pytest.mark.parametrize(
    "name", ["good", "good without trees", "good without self-serving", "good again"]
)
def test_good_start_is_accepted(refusals: Results, name: str) -> None:
    assert refusals[name]["error"] == "", refusals[name]["message"]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("old vLLM", r"^vLLM 0\.31\.2 is too old; install vLLM 0\.32 to 0\.33$"),
        (
            "broken patch point",
            r"^ViSpec: patch point \S+ does not fit this vLLM.*install vLLM 0\.32 to 0\.33",
        ),
        (
            "broken trees",
            r'^draft trees: patch point \S+Attention\.get_kv_cache_spec .*; leave "tree" out of ',
        ),
        (
            "broken self-serving",
            r"^serving a head with the target it names: .*; serve the target, with the head in",
        ),
    ],
)
def test_unfit_vllm_is_refused(refusals: Results, name: str, message: str) -> None:
    found = refusals[name]
    assert found["error"] == "ViSpecError", found["message"]
    assert re.search(message, found["message"]), found["message"]
    assert "\n" not in found["message"]


@pytest.mark.parametrize("version", ["0.31.9", "0.9.0"])
def test_old_version(version: str) -> None:
    assert version_problem(version) == f"vLLM {version} is too old; install vLLM 0.32 to 0.33"


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0+cpu", "0.33.1rc1", "0.34.0", "1.0", "dev"])
def test_other_versions_go_on(version: str) -> None:
    assert version_problem(version) is None

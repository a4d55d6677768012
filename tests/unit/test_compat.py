"""Patch points: all listed, all checked, and a mismatch disables ViSpec with one clear error."""

import dataclasses
import re
from pathlib import Path

import pytest

from vllm_vispec import plugin
from vllm_vispec.compat import check
from vllm_vispec.compat.check import PATCH_POINTS, PatchPoint, check_patch_points, first_broken

PACKAGE = Path(plugin.__file__).parent


def test_every_patch_point_fits_the_installed_vllm() -> None:
    assert [state.name for state in check_patch_points() if not state.ok] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"symbol": "EngineArgs.renamed"}, "EngineArgs.renamed not found"),
        ({"symbol": "Renamed.create"}, "Renamed.create not found"),
        ({"module": "vllm.engine.moved"}, "module vllm.engine.moved not found"),
        ({"parameters": ("target_model_config", "surprise")}, "no parameter 'surprise'"),
        (
            {"parameters": ("target_parallel_config", "target_model_config")},
            "parameters in another order",
        ),
        ({"symbol": "EngineArgs.self.never_set"}, "EngineArgs.self.never_set not found"),
    ],
)
def test_a_changed_patch_point_is_found(change: dict[str, object], said: str) -> None:
    point = dataclasses.replace(PATCH_POINTS[0], **change)  # type: ignore[arg-type]
    broken = first_broken((point,))
    assert broken is not None
    assert said in broken.detail


def test_a_broken_patch_point_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = PatchPoint("vllm.engine.arg_utils", "EngineArgs.gone", (), "wraps", "test")
    monkeypatch.setattr(check, "PATCH_POINTS", (broken,))
    monkeypatch.setattr(check, "first_broken", lambda: first_broken((broken,)))
    problem = plugin.find_problem()
    assert problem is not None
    assert "vllm.engine.arg_utils:EngineArgs.gone" in problem
    assert "install vLLM 0.32 to 0.33" in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("version", "refused"),
    [("0.31.2", True), ("0.32.0", False), ("0.33.1+cpu", False), ("0.40.0", False), ("dev", False)],
)
def test_versions(version: str, refused: bool) -> None:
    problem = plugin.version_problem(version)
    assert (problem is not None) == refused
    if problem:
        assert "install vLLM 0.32 to 0.33" in problem


def test_a_newer_version_warns(caplog: pytest.LogCaptureFixture) -> None:
    plugin.logger.propagate = True
    with caplog.at_level("WARNING", logger=plugin.logger.name):
        plugin.version_problem("0.40.0")
    assert "was tested with vLLM 0.32 to 0.33, this is 0.40.0" in caplog.text


def test_every_override_of_a_vllm_class_stands_in_the_table() -> None:
    """Methods of our proposers that vLLM's classes have too must be listed."""
    listed = {point.symbol.split(".")[-1] for point in PATCH_POINTS}
    for name in (
        "v1.py",
        "v2.py",
        "trees/v1.py",
        "trees/v1_sampler.py",
        "trees/padded_impl.py",
        "trees/v2.py",
        "trees/v2_sampler.py",
    ):
        text = (PACKAGE / "engine" / name).read_text()
        overridden = set(re.findall(r"super\(\)\.(\w+)\(", text)) - {"__init__"}
        assert overridden <= listed, name


def test_every_assignment_to_vllm_stands_in_the_table() -> None:
    """Whatever the package assigns on a vLLM class is listed as wrapped or subclassed."""
    listed = {point.symbol for point in PATCH_POINTS if point.use in ("wraps", "subclasses")}
    assigned = set()
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assigned |= set(re.findall(r"^\s+([A-Z]\w+\.\w+) = ", text, re.MULTILINE))
        # `sys.excepthook` is Python's.
        wrapped = re.findall(r'wrap_once\((?!sys,)(\w+), "(\w+)"', text)
        # Functions of a module are listed by their name alone.
        assigned |= {f"{owner}.{name}" if owner[0].isupper() else name for owner, name in wrapped}
        # Functions of a vLLM module.
        assigned |= set(re.findall(r"^\s+rejection_sampler\.(\w+) = ", text, re.MULTILINE))
    assert assigned == {
        "Attention.__init__",
        "Attention.get_kv_cache_spec",
        "EngineArgs.create_engine_config",
        "EngineArgs.create_speculative_config",
        "FlashInferMetadataBuilder.set_workspace_buffer",
        "ModelState.custom_sampler",
        "TritonAttentionMetadataBuilder.__init__",
        "VllmConfig.num_lookahead_tokens",
        "WorkerBase.__init__",
        "expand_batch_to_tokens",
        "maybe_override_with_speculators",
    }
    assert assigned <= listed

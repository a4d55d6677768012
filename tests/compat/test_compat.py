"""Patch points: all listed, checked when their feature is used, and a misfit disables no other."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.heads import BASE
from tests.support.runners import overlay_folder
from tests.support.small_draft_vlms import DRAFT_VLM
from vllm_vispec import plugin
from vllm_vispec.compat import check, source, versions
from vllm_vispec.compat.check import check_points, first_broken, group_problem, require
from vllm_vispec.compat.features import needed_groups
from vllm_vispec.compat.groups import (
    CHAINS,
    CORE,
    GROUPS,
    PADDED_HEADS,
    PROFILE,
    SCRATCH,
    SELF_SERVING,
    VERIFY,
    VERIFY_ATTENTION,
)
from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint, Runner
from vllm_vispec.compat.patching import patch
from vllm_vispec.compat.refusal import Refusal
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.spec_decode.options import EngineOptions
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.errors import ViSpecError

PACKAGE = Path(plugin.__file__).parent
PARTS = [
    pytest.param(group, runner, id=f"{group.name} {runner or ''}".replace(" ", "-").strip("-"))
    for group in GROUPS
    for runner in group.runners
]
READ_MODULE = source.read_module


@pytest.mark.parametrize(("group", "runner"), PARTS)
def test_every_patch_point_fits_the_installed_vllm(
    group: PatchGroup, runner: Runner | None
) -> None:
    assert [state for state in check_points(group.points(runner)) if not state.ok] == []


@pytest.mark.overlay
def test_every_patch_point_fits_the_next_release(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(overlay_folder())

    def read(module: str) -> str | None:
        path = folder.joinpath(*module.split(".")).with_suffix(".py")
        return path.read_text(encoding="utf-8") if path.is_file() else None

    monkeypatch.setattr(check, "read_module", read)
    for group in GROUPS:
        assert [state for state in check_points(group.points()) if not state.ok] == []


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
def test_a_changed_patch_point_is_found(change: dict[str, Any], said: str) -> None:
    point = next(p for p in CORE.common if p.symbol.endswith("create_speculative_config"))
    broken = first_broken((replace(point, **change),))
    assert broken is not None
    assert broken.problem is not None
    assert said in broken.problem


SOURCE = '''
class First(Base):
    """Says def other(hidden)."""

    field: int = 0

    @property
    def member(self) -> int:
        self.size, self.depth = 1, 2
        self.kept: dict[str, int] = {}
        return 0

    async def run(
        self,
        # a comment with a colon:
        x: dict[str, int],
        *,
        y: Callable[[int], int] = lambda z: z,
    ) -> tuple[
        int
    ]: ...


class Second:
    def run(self, other): ...


limit = 3
if limit:
    class Hidden: ...
'''


@pytest.mark.parametrize(
    ("symbol", "parameters"),
    [
        ("First", []),
        ("First.field", []),
        ("First.member", ["self"]),
        ("First.run", ["self", "x", "y"]),
        ("Second.run", ["self", "other"]),
        ("First.self.size", []),
        ("First.self.depth", []),
        ("First.self.kept", []),
        ("limit", []),
        ("First.other", None),
        ("Second.member", None),
        ("Second.self.size", None),
        ("Hidden", None),
        ("First.self.kep", None),
    ],
)
def test_symbols_are_found_in_the_text(symbol: str, parameters: list[str] | None) -> None:
    assert source.find_parameters(SOURCE, symbol) == parameters
    assert source._parse(SOURCE, symbol) == parameters


def _settings(
    head: HeadConfig = BASE, *, adaptive: bool = False, **options: Any
) -> SimpleNamespace:
    """Return vLLM's configuration, as far as it says what a head and its settings need."""
    content = head.to_llama_config_dict() | EngineOptions(**options).to_section()
    named = content | {"architectures": [head.architecture], "to_dict": lambda: content}
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            draft_model_config=SimpleNamespace(hf_config=SimpleNamespace(**named)),
            enable_adaptive_verification=adaptive,
            num_speculative_tokens=29,
            num_speculative_tokens_per_batch_size=None,
        ),
    )


SETTINGS: dict[str, Any] = {
    "chains": _settings(),
    "uncompressed": _settings(replace(BASE, compress=False, global_feature=False)),
    "gate": _settings(replace(BASE, compressor="select", num_query_tokens=1)),
    "draft VLM": _settings(DRAFT_VLM),
    "draft_vocab": _settings(draft_vocab="auto", draft_vocab_file="tokens.txt"),
    "adaptive verification": _settings(adaptive=True),
    "trees": _settings(tree=TreeSettings().to_config()),
}
"""Configurations by the group that only they need, but for the first."""


def _without(point: PatchPoint) -> Callable[[str], str | None]:
    """Return a reader of vLLM's source in which one definition has another name."""
    owner, _, name = point.symbol.replace(".self.", ".").rpartition(".")

    def read(module: str) -> str | None:
        text = READ_MODULE(module)
        if module != point.module or text is None:
            return text
        scope = (source._class_body(text, owner) if owner else text) or ""
        return text.replace(scope, re.sub(rf"\b{name}\b", f"{name}_of_another_release", scope))

    return read


def _point_to_break(group: PatchGroup, runner: Runner | None) -> PatchPoint:
    """Return a patch point that no other group needs if there is one, else any."""
    mine = group.common if runner is None else group.points_of(runner)
    others = {point.name for other in GROUPS if other is not group for point in other.points()}
    return next((point for point in mine if point.name not in others), mine[0])


@pytest.mark.parametrize(("group", "runner"), PARTS)
def test_a_broken_patch_point_disables_its_feature_alone(
    group: PatchGroup, runner: Runner | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which configurations are refused on which runner, and with which line."""
    point = _point_to_break(group, runner)
    monkeypatch.setattr(check, "read_module", _without(point))
    refused = set()
    for name, settings in SETTINGS.items():
        for used in ("v1", "v2"):
            needed = needed_groups(settings, used)
            problems = [p for g in needed if (p := group_problem(g, used)) is not None]
            if problems:
                refused.add((name, used))
            touched = [g for g in needed if point.name in {p.name for p in g.points(used)}]
            assert len(problems) == len(touched), (name, used, problems)
    runners = ("v1", "v2") if runner is None else (runner,)
    if group in (CORE, CHAINS, PADDED_HEADS):
        spared = {"uncompressed", "draft VLM"} if group is PADDED_HEADS else set()
        assert refused == {(n, used) for n in SETTINGS for used in runners if n not in spared}
    else:
        assert "chains" not in {name for name, _ in refused}
        assert {(group.name, used) for used in runners if group.name in SETTINGS} <= refused
    (problem,) = filter(None, [group_problem(group, runner)])
    for said in (group.feature, point.name, group.remedy, "install vLLM 0.32 to 0.33"):
        assert said in problem
    assert "\n" not in problem


def test_every_feature_has_a_group_and_a_configuration_that_needs_it() -> None:
    """Those that no engine needs: `vllm serve HEAD`, and what measures."""
    needed = {g for s in SETTINGS.values() for used in ("v1", "v2") for g in needed_groups(s, used)}
    measuring = {PROFILE, VERIFY, VERIFY_ATTENTION}
    assert set(GROUPS) - needed == {SCRATCH, SELF_SERVING, *measuring}


@pytest.mark.parametrize(
    ("gone", "runner"),
    [
        (("vllm.v1.worker.gpu_model_runner", "vllm.v1.spec_decode."), "v2"),
        (("vllm.v1.worker.gpu.",), "v1"),
    ],
)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_removed_runner_leaves_the_other(
    gone: tuple[str, ...], runner: Runner, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        check, "read_module", lambda m: None if m.startswith(gone) else READ_MODULE(m)
    )
    for group in needed_groups(SETTINGS[name], runner):
        require(group, runner)
    other: Runner = "v1" if runner == "v2" else "v2"
    with pytest.raises(
        ViSpecError, match=rf"^ViSpec on the {other.upper()} model runner: .*not found"
    ):
        require(CHAINS, other)


def test_a_broken_core_disables_our_method_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    point = next(p for p in CORE.common if p.symbol.startswith("WorkerBase"))
    monkeypatch.setattr(check, "read_module", _without(point))
    problem = plugin.find_problem()
    assert problem is not None
    assert problem.startswith(f"ViSpec: patch point {point.name} does not fit this vLLM")
    refuse = Refusal(problem)
    with pytest.raises(ViSpecError, match=r"install vLLM 0\.32 to 0\.33"):
        refuse(None, SimpleNamespace(speculative_config={"method": "vispec"}))
    other = SimpleNamespace(speculative_config={"method": "ngram"})
    assert refuse(lambda args: args, other) is other


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_plain_chains_need_the_core_chains_and_their_wider_heads_alone(runner: Runner) -> None:
    assert needed_groups(SETTINGS["chains"], runner) == [CORE, CHAINS, PADDED_HEADS]


def test_the_check_of_v2_chains_reads_no_other_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays cheap: a score of texts, none of V1's, and no module is parsed."""
    read: list[str] = []

    def note(module: str) -> str | None:
        read.append(module)
        return READ_MODULE(module)

    monkeypatch.setattr(check, "read_module", note)
    monkeypatch.setattr(source, "_parse", lambda text, symbol: pytest.fail(f"parsed for {symbol}"))
    for group in needed_groups(SETTINGS["chains"], "v2"):
        require(group, "v2")
    assert len(set(read)) <= 20
    assert not [m for m in read if ".spec_decode." in m and ".gpu." not in m]
    assert "vllm.v1.worker.gpu_model_runner" not in read


@pytest.mark.parametrize(
    ("version", "refused"),
    [("0.31.2", True), ("0.32.0", False), ("0.33.1+cpu", False), ("0.40.0", False), ("dev", False)],
)
def test_versions(version: str, refused: bool) -> None:
    problem = versions.version_problem(version)
    assert (problem is not None) == refused
    if problem:
        assert "install vLLM 0.32 to 0.33" in problem


def test_a_newer_version_warns(caplog: pytest.LogCaptureFixture) -> None:
    versions.logger.addHandler(caplog.handler)
    try:
        versions.version_problem("0.40.0")
    finally:
        versions.logger.removeHandler(caplog.handler)
    assert "was tested with vLLM 0.32 to 0.33, this is 0.40.0" in caplog.text


class _Owner:
    """Stands for a class of vLLM's."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def add(self, count: int) -> int:
        return self.value + count

    @property
    def twice(self) -> int:
        return 2 * self.value


def _one_more(original: Callable[..., int], *args: Any) -> int:
    return original(*args) + 1


def test_patching_happens_once_on_classes_and_properties() -> None:
    owner = type("Owner", (_Owner,), dict(vars(_Owner)))
    for _ in range(2):
        patch(owner, "add", _one_more)
        patch(owner, "twice", _one_more)
    assert (owner(3).add(1), owner(3).twice) == (5, 7)
    patch(owner, "add", lambda original, *args: 10 * original(*args))
    assert owner(3).add(1) == 50


def test_patching_one_object_leaves_the_others() -> None:
    changed, other = _Owner(3), _Owner(3)
    for _ in range(2):
        patch(changed, "add", _one_more)
    assert (changed.add(1), other.add(1)) == (5, 4)


def test_patching_new_chooses_the_class() -> None:
    base = type("Base", (_Owner,), {})
    ours = type("Ours", (base,), {})

    def new(original: Callable[..., Any], cls: type, value: int) -> Any:
        return original(ours if cls is base and value > 1 else cls)

    patch(base, "__new__", new)
    assert [type(base(value)) for value in (1, 2)] == [base, ours]
    assert base(2).value == 2


def test_every_override_of_a_vllm_class_is_listed() -> None:
    """Methods of our proposers that vLLM's classes have too must be listed."""
    listed = {point.symbol.split(".")[-1] for group in GROUPS for point in group.points()}
    for name in (
        "v1/proposer.py",
        "spec_decode/speculator.py",
        "v1/tree_proposer.py",
        "v1/tree_sampler.py",
        "models/padded_impl.py",
        "trees/speculator.py",
        "trees/rejection_sampler.py",
    ):
        text = (PACKAGE / name).read_text()
        overridden = set(re.findall(r"super\(\)\.(\w+)\(", text)) - {"__init__"}
        assert overridden <= listed, name


def test_every_patch_is_listed_and_there_is_no_other_way() -> None:
    """Whatever `patch` changes is listed as wrapped or subclassed; nothing is assigned by hand."""
    points = [point for group in GROUPS for point in group.points()]
    listed = {p.symbol for p in points if p.use in ("wraps", "subclasses")}
    names = {symbol.split(".")[-1] for symbol in listed} | {"__new__"}
    patched, assigned = set(), set()
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        # `sys.excepthook` is Python's.
        patched |= set(re.findall(r'\bpatch\((?!sys,)(\w+(?:\.\w+)*), "(\w+)"', text))
        assigned |= set(re.findall(r"^\s+([A-Z]\w+\.\w+) = ", text, re.MULTILINE))
        assigned |= set(re.findall(r"\bsetattr\(([A-Z]\w+|module)\b", text))
    assert assigned == set()
    assert {name for _, name in patched} <= names
    on_classes = {f"{owner}.{name}" for owner, name in patched if owner[0].isupper()}
    assert on_classes == {
        "Attention.__init__",
        "CPUDNNLGEMMHandler.__del__",
        "Attention.get_kv_cache_spec",
        "EagleProposer.__new__",
        "EagleSpeculator.__new__",
        "EngineArgs.create_engine_config",
        "EngineArgs.create_speculative_config",
        "FlashInferMetadataBuilder.set_workspace_buffer",
        "ModelState.custom_sampler",
        "TritonAttentionMetadataBuilder.__init__",
        "VllmConfig.num_lookahead_tokens",
        "WorkerBase.__init__",
    }
    assert {p for p in on_classes if not p.endswith("__new__")} <= listed

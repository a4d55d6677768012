"""Patch points: all listed, checked when their feature is used, and a misfit disables no other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.heads import BASE, DRAFT_VLM
from tests.support.runners import overlay_folder
from vllm_vispec import plugin
from vllm_vispec.compat import check, groups, source
from vllm_vispec.compat.check import check_points, first_broken, group_problem, require
from vllm_vispec.compat.groups import GROUPS, check_features, needed_groups, unique_points
from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint, Runner
from vllm_vispec.compat.patching import patch
from vllm_vispec.config import ViSpecConfig
from vllm_vispec.heads.config import DRAFT_MODEL_ARCHITECTURE, HeadConfig
from vllm_vispec.models.patch_points import PADDED_HEADS
from vllm_vispec.scheduling.patch_points import SCHEDULING
from vllm_vispec.spec_decode.patch_points import CHAINS, CORE
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.v1.patch_points import CHAINS as V1_CHAINS

PACKAGE = Path(plugin.__file__).parent
READ_MODULE = source.read_module


def by_title(group: PatchGroup) -> str:
    return group.title.replace(" ", "-")


def test_every_patch_point_fits_the_installed_vllm() -> None:
    assert [state for state in check_points(unique_points()) if not state.ok] == []


@pytest.mark.overlay
def test_every_patch_point_fits_the_next_release(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(overlay_folder())

    def read(module: str) -> str | None:
        path = folder.joinpath(*module.split("."))
        files = (path.with_suffix(".py"), path / "__init__.py")
        return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), None)

    monkeypatch.setattr(check, "read_module", read)
    assert [state for state in check_points(unique_points()) if not state.ok] == []


ARGS = "vllm.engine.arg_utils:EngineArgs"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (f"{ARGS}.renamed", "EngineArgs.renamed not found"),
        ("vllm.engine.arg_utils:Renamed.create", "Renamed.create not found"),
        ("vllm.engine.moved:EngineArgs", "module vllm.engine.moved not found"),
        (f"{ARGS}.create_engine_config(surprise)", "no parameter 'surprise'"),
        (
            f"{ARGS}.create_speculative_config(target_parallel_config, target_model_config)",
            "parameters in another order",
        ),
        (f"{ARGS}.self.never_set", "EngineArgs.self.never_set not found"),
        (f"{ARGS}{{model, create_engine_config(usage_context), other}}", "other not found in"),
        (f"{ARGS}{{model, create_engine_config(usage)}}", "no parameter 'usage'"),
        (f"{ARGS}{{model, create_engine_config(usage_context), tokenizer}}", None),
    ],
)
def test_a_changed_patch_point_is_found(place: str, said: str | None) -> None:
    broken = first_broken((PatchPoint("reads", place, ""),))
    assert (broken is None) is (said is None)
    assert broken is None or (said or "") in (broken.problem or "")


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
    head: HeadConfig = BASE,
    *,
    adaptive: bool = False,
    is_v2: bool = True,
    architecture: str | None = None,
    **settings: Any,
) -> SimpleNamespace:
    """Return vLLM's configuration, as far as it says what a head and its settings need."""
    content = head.to_llama_config_dict()
    named = content | {
        "architectures": [architecture or head.architecture],
        "to_dict": lambda: content,
    }
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            draft_model_config=SimpleNamespace(hf_config=SimpleNamespace(**named)),
            enable_adaptive_verification=adaptive,
            num_speculative_tokens=29,
            num_speculative_tokens_per_batch_size=None,
        ),
        additional_config=ViSpecConfig(**settings).to_section(),
        use_v2_model_runner=is_v2,
    )


SETTINGS: dict[str, Any] = {
    "chains": _settings(),
    "uncompressed": _settings(replace(BASE, compress=False, global_feature=False)),
    "gate": _settings(replace(BASE, compressor="select", num_query_tokens=1)),
    "draft VLM": _settings(DRAFT_VLM),
    "draft model": _settings(DRAFT_VLM, architecture=DRAFT_MODEL_ARCHITECTURE),
    "draft_vocab": _settings(draft_vocab="auto"),
    "adaptive verification": _settings(adaptive=True),
    "trees": _settings(tree=TreeSettings()),
}
"""Configurations by the group that only they need, but for the first."""


def _without(point: PatchPoint) -> Callable[[str], str | None]:
    """Return a reader of vLLM's source in which one definition has another name."""
    owner, _, name = point.symbols[0].name.replace(".self.", ".").rpartition(".")

    def read(module: str) -> str | None:
        text = READ_MODULE(module)
        if module != point.module or text is None:
            return text
        scope = (source._class_body(text, owner) if owner else text) or ""
        return text.replace(scope, re.sub(rf"\b{name}\b", f"{name}_of_another_release", scope))

    return read


def _point_to_break(group: PatchGroup) -> PatchPoint:
    """Return a patch point that no other group needs if there is one, else any."""
    others = {p.name for other in GROUPS if other is not group for p in other.points}
    return next((p for p in group.points if p.name not in others), group.points[0])


@pytest.mark.parametrize("group", GROUPS, ids=by_title)
def test_a_broken_patch_point_disables_its_feature_alone(
    group: PatchGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which configurations are refused on which runner, and with which line."""
    monkeypatch.setattr(check, "read_module", _without(_point_to_break(group)))
    refused = {
        (name, runner)
        for name, settings in SETTINGS.items()
        for runner in ("v1", "v2")
        if any(group_problem(needed) for needed in needed_groups(settings, runner))
    }
    runners = ("v1", "v2") if group.runner is None else (group.runner,)
    if group in (CORE, CHAINS, SCHEDULING, V1_CHAINS, PADDED_HEADS):
        spared = {"uncompressed", "draft VLM", "draft model"} if group is PADDED_HEADS else set()
        assert refused == {(n, used) for n in SETTINGS for used in runners if n not in spared}
    else:
        assert "chains" not in {name for name, _ in refused}
        assert {(group.name, used) for used in runners if group.name in SETTINGS} <= refused
    problem = group_problem(group) or ""
    for said in (group.feature, group.remedy, "install vLLM 0.32 to 0.33"):
        assert said in problem
    assert "\n" not in problem


def test_every_feature_has_a_configuration_that_needs_it() -> None:
    """Those that no engine needs: `vllm serve HEAD`, what measures, and GPUs' scratch."""
    needed = {g for s in SETTINGS.values() for used in ("v1", "v2") for g in needed_groups(s, used)}
    others = {group.name for group in set(GROUPS) - needed}
    assert others == {"scratch", "self-serving", "profile", "verify"}


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
        require(group)
    chains = V1_CHAINS if runner == "v2" else CHAINS
    other = "V1" if runner == "v2" else "V2"
    with pytest.raises(ViSpecError, match=rf"^ViSpec on the {other} model runner: .*not found"):
        require(chains)


WITHOUT_V1 = """
import sys
from importlib import import_module
from pathlib import Path
# An editable install would find the folder after all.
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
import vllm_vispec
from vllm_vispec import plugin
from vllm_vispec.compat import groups
root = Path(vllm_vispec.__file__).parent
assert not (root / "v1").exists()
plugin.register()
for group in groups.GROUPS:
    if group.runner == "v2":
        group.apply()
rooms = "spec_decode trees models draft_vlm draft_model draft_vocab compressors bench"
for room in rooms.split():
    for path in (root / room).glob("*.py"):
        import_module(f"vllm_vispec.{room}.{path.stem}")
assert "chains on V1" not in [group.title for group in groups.GROUPS]
from types import SimpleNamespace
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
draft = SimpleNamespace(hf_config=SimpleNamespace(architectures=["EagleViSpecForCausalLM"]))
speculative = SimpleNamespace(draft_model_config=draft)
config = SimpleNamespace(speculative_config=speculative, additional_config={})
assert type(EagleSpeculator.__new__(EagleSpeculator, config)).__name__ == "ViSpecSpeculator"
draft.hf_config.architectures = ["EagleLlamaForCausalLM"]
assert type(EagleSpeculator.__new__(EagleSpeculator, config)) is EagleSpeculator
"""


def test_without_the_folder_v1_the_v2_runner_works(tmp_path: Path) -> None:
    """Every module that V2 engines import, their checks and their patches."""
    ignored = shutil.ignore_patterns("v1", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "vllm_vispec", ignore=ignored)
    env = os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_V1], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_runner_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "GROUPS", tuple(g for g in GROUPS if g.runner != "v1"))
    assert CHAINS in check_features(_settings())
    with pytest.raises(ViSpecError, match=r"no V1 model runner: use .*RUNNER=1\)"):
        check_features(_settings(is_v2=False))


def test_a_broken_core_disables_our_method_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    point = next(p for p in CORE.points if "WorkerBase" in p.place)
    monkeypatch.setattr(check, "read_module", _without(point))
    problem = plugin.find_problem()
    assert problem is not None
    assert problem.startswith(f"ViSpec: patch point {point.name} does not fit this vLLM")
    refuse = plugin.Refusal(problem)
    with pytest.raises(ViSpecError, match=r"install vLLM 0\.32 to 0\.33"):
        refuse(None, SimpleNamespace(speculative_config={"method": "vispec"}))
    other = SimpleNamespace(speculative_config={"method": "ngram"})
    assert refuse(lambda args: args, other) is other


def test_plain_chains_need_the_core_chains_and_their_wider_heads_alone() -> None:
    v1, v2 = (needed_groups(SETTINGS["chains"], used) for used in ("v1", "v2"))
    assert v2 == [CORE, CHAINS, SCHEDULING, PADDED_HEADS]
    assert v1 == [CORE, SCHEDULING, PADDED_HEADS, V1_CHAINS]
    # The check stays cheap.
    modules = {point.module for group in v2 for point in group.points}
    assert len(modules) <= 20
    assert not [m for m in modules if ".spec_decode." in m and ".gpu." not in m]
    assert "vllm.v1.worker.gpu_model_runner" not in modules


@pytest.mark.parametrize(
    ("version", "refused", "warned"),
    [
        ("0.31.2", "install vLLM 0.32 to 0.33", ""),
        ("0.32.0", "", ""),
        ("0.33.1+cpu", "", ""),
        ("0.40.0", "", "was tested with vLLM 0.32 to 0.33, this is 0.40.0"),
        ("dev", "", "cannot read vLLM's version 'dev'"),
    ],
)
def test_versions(
    version: str, refused: str, warned: str, caplog: pytest.LogCaptureFixture
) -> None:
    problem = check.version_problem(version) or ""
    assert bool(problem) is bool(refused)
    assert refused in problem
    assert bool(caplog.messages) is bool(warned)
    assert warned in caplog.text


class Owner:
    """Stands for a class of vLLM's."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def add(self, count: int) -> int:
        return self.value + count

    @property
    def twice(self) -> int:
        return 2 * self.value


def test_patching_happens_once_on_classes_properties_and_objects() -> None:
    def one_more(original: Callable[..., int], *args: Any) -> int:
        return original(*args) + 1

    def new(original: Callable[..., Any], cls: type, value: int) -> Any:
        return original(ours if cls is owner and value > 3 else cls)

    owner = type("Owner", (Owner,), dict(vars(Owner)))
    ours = type("Ours", (owner,), {})
    changed, other = owner(3), owner(3)
    for _ in range(2):
        patch(owner, "add", one_more)
        patch(owner, "twice", one_more)
    assert (other.add(1), other.twice) == (5, 7)
    patch(changed, "add", lambda original, *args: 10 * original(*args))
    assert (changed.add(1), other.add(1)) == (50, 5)
    patch(owner, "__new__", new)
    assert [type(owner(value)) for value in (3, 4)] == [owner, ours]
    assert owner(4).value == 4


def _listed(*uses: str) -> set[str]:
    points = (point for group in GROUPS for point in group.points)
    return {s.name for point in points if not uses or point.use in uses for s in point.symbols}


PUBLIC = {"load_model", "load_weights", "compute_logits", "__init__", "capture"}
"""Members that vLLM expects of every speculator or model."""


def test_every_override_of_a_vllm_class_is_listed() -> None:
    """Methods of our speculators that vLLM's classes have too."""
    listed = {symbol.split(".")[-1] for symbol in _listed()} | PUBLIC
    names = ("*/*speculator.py", "*/*sampler.py", "*/*proposer.py", "*/*scheduler.py")
    paths = {path for name in names for path in PACKAGE.glob(name)}
    others = ("trees/attention.py", "trees/model_state.py", "v1/tree_verification.py")
    paths |= {PACKAGE / name for name in others}
    assert len(paths) >= 6
    for path in paths:
        overridden = set(re.findall(r"super\(\)\.(\w+)\(", path.read_text()))
        assert overridden <= listed, path.name


def test_every_patch_is_listed_and_there_is_no_other_way() -> None:
    """Whatever `patch` changes is listed as wrapped or subclassed; nothing is assigned by hand."""
    listed = _listed("wraps", "subclasses")
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
    assert {"EagleSpeculator.__new__", "WorkerBase.__init__"} <= on_classes
    assert {name for name in on_classes if not name.endswith("__new__")} <= listed

"""A head that is served by its own name, and one that is named by its hub id.

`vllm serve HEAD`: a head's folder finds its target, and answers like the explicit form. A hub id
goes to the workers, not the folder it has on the front process's machine. One head in all its
checkpoint formats drafts the same.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.child import Child
from tests.support.engine import Engine, EngineOptions, register_plugin
from tests.support.engine import engine as running_engine
from tests.support.hub_cache import COMMIT, fill_hub_cache, hub_snapshot_folder
from tests.support.runners import runners
from tests.support.spies import drafter, record
from tests.support.tiny_configs import VOCAB
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import Served, drive, mixed_requests, serve_requests
from vllm_vispec.draft_vocab.files import write_vocab
from vllm_vispec.heads.folder import DRAFT_VOCAB

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

NUM_TOKENS = 3
OPTIONS: Mapping[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
REQUESTS = mixed_requests(KIND, 6, 16)


@pytest.fixture(scope="module")
def head(tiny: TinyStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained draft's export that names its target by a relative path."""
    from vllm_vispec.heads.export import export_head
    from vllm_vispec.heads.folder import load_draft

    folder = tmp_path_factory.mktemp("exported") / "head"
    export_head(
        load_draft(tiny.head()),
        folder,
        target=os.path.relpath(tiny.target()),
        dtype="float32",
        num_speculative_tokens=NUM_TOKENS,
        provenance={"command": "a test"},
    )
    return folder


@pytest.mark.parametrize("runner", runners("v1", "v1-overlay"))
def test_answers_like_the_explicit_form(
    engine: Callable[..., Engine], tiny: TinyStore, head: Path, runner: str
) -> None:
    explicit = engine(runner, **OPTIONS, draft=str(head), num_draft_tokens=NUM_TOKENS)
    expected = explicit.run(serve_requests, REQUESTS)
    itself = engine(
        runner,
        **OPTIONS,
        model=str(head),
        extra={"per_request_spec_decode_metrics": "detailed"},
    )
    found = itself.run(serve_requests, REQUESTS)
    assert itself.run(_model_and_drafter) == (str(tiny.target()), "ViSpecProposer")
    assert found.outputs() == expected.outputs()
    assert found.accepted() == expected.accepted()
    assert max(drafted for drafted, _ in found.steps()) == NUM_TOKENS
    assert found.acceptance() > 0


def _model_and_drafter(llm: LLM) -> tuple[str, str]:
    return llm.llm_engine.model_config.model, type(drafter(llm)).__name__


def _copy(head: Path, folder: Path, target: str) -> str:
    """A head's config.json alone, with another target."""
    content = json.loads((head / "config.json").read_text())
    content["speculators_config"]["verifier"]["name_or_path"] = target
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture(scope="module")
def resolved(
    tiny: TinyStore, head: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What vLLM's argument handling makes of different heads and settings."""
    folder = tmp_path_factory.mktemp("heads")
    cache, target = folder / "cache", str(tiny.target())
    absolute = _copy(head, folder / "absolute", target)
    # Downloads of heads, one of which names a folder, and of a target.
    _copy(head, hub_snapshot_folder(cache, "org/head"), str(head))
    snapshot = _copy(head, hub_snapshot_folder(cache, "a/b"), "a/target")
    _copy(head, hub_snapshot_folder(cache, "a/target"), target)
    settings = {"num_speculative_tokens": 2, "method": "eagle", "image_table_size": 7}
    cases: dict[str, dict[str, Any]] = {
        "relative": {"model": str(head)},
        "absolute": {"model": absolute, "tokenizer": "mine"},
        "settings": {"model": absolute, "settings": settings},
        "missing": {"model": _copy(head, folder / "missing", "../nowhere")},
        "hub": {"model": _copy(head, folder / "hub", "no-such-org/no-such-target")},
        "fetched": {"model": "org/head"},
        "plain": {"model": target},
        "snapshot": {"model": snapshot},
    }
    child = Child({"HF_HUB_CACHE": str(cache)})
    found = {name: child.call(_resolve, **case) for name, case in cases.items()}
    child.close()
    return found


def _resolve(
    model: str, tokenizer: str | None = None, settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    register_plugin()
    from vllm.engine import arg_utils

    try:
        model, tokenizer, settings = arg_utils.maybe_override_with_speculators(
            model=model,
            tokenizer=tokenizer,
            revision=None,
            trust_remote_code=False,
            vllm_speculative_config=settings,
            hf_token=None,
        )
    except Exception as error:
        return {"error": str(error), "kind": type(error).__name__}
    return {"model": model, "tokenizer": tokenizer, "settings": settings}


def test_the_target_is_found(
    tiny: TinyStore, head: Path, resolved: dict[str, dict[str, Any]]
) -> None:
    target, found = str(tiny.target()), resolved["relative"]
    assert (found["model"], found["tokenizer"]) == (target, target)
    assert found["settings"] == {
        "method": "vispec",
        "num_speculative_tokens": NUM_TOKENS,
        "model": str(head),
    }
    assert resolved["absolute"]["model"] == target
    assert resolved["plain"]["model"] == target
    assert resolved["plain"]["settings"] is None


def test_a_snapshot_of_the_hub_stays_a_hub_id(resolved: dict[str, dict[str, Any]]) -> None:
    """Offline, vLLM hands over the folder that the id has on this machine."""
    found = resolved["snapshot"]
    assert found["model"] == "a/target"
    assert (found["settings"]["model"], found["settings"]["revision"]) == ("a/b", COMMIT)


def test_the_users_settings_win(resolved: dict[str, dict[str, Any]]) -> None:
    """Except for method and head, which are what was asked to be served."""
    assert resolved["absolute"]["tokenizer"] == "mine"
    settings = resolved["settings"]["settings"]
    assert (settings["num_speculative_tokens"], settings["image_table_size"]) == (2, 7)
    assert settings["method"] == "vispec"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "there is no model in"),
        ("hub", "target 'no-such-org/no-such-target', which head"),
        ("fetched", "as its target, which a head from a hub may not"),
    ],
)
def test_a_target_that_cannot_be_had(
    resolved: dict[str, dict[str, Any]], name: str, message: str
) -> None:
    found = resolved[name]
    assert found["kind"] == "ViSpecError"
    assert message in found["error"]
    assert "\n" not in found["error"]


HUB_ID = "org/head"
OTHER_PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


@pytest.mark.parametrize("runner", runners("v1", "v2", slow=["v2"]))
def test_worker_with_a_cache_of_its_own(
    engine: Callable[..., Engine],
    child: Callable[..., Child],
    tiny: TinyStore,
    tmp_path: Path,
    runner: str,
) -> None:
    # A list of draft tokens, of which every third is missing, comes with the head.
    head = tiny.head(seed=78)
    write_vocab(Path(head) / DRAFT_VOCAB, [token for token in range(VOCAB) if token % 3])
    auto: dict[str, Any] = {**OPTIONS, "num_draft_tokens": 4, "config": {"draft_vocab": "auto"}}
    expected = engine("v1", **auto, draft=head).run(serve_requests, REQUESTS)
    caches = [tmp_path / "front", tmp_path / "workers"]
    for cache in caches:
        fill_hub_cache(cache, HUB_ID, Path(head))
    options = EngineOptions(str(tiny.target()), draft=HUB_ID, **auto)
    env = OTHER_PROCESSES | {"HF_HUB_CACHE": str(caches[0])}
    found, *named = child(runner, env).call(_serve_with_caches, options, caches)
    assert not caches[0].exists()
    assert named == [HUB_ID, COMMIT]
    assert found.outputs() == expected.outputs()
    assert found.accepted() == expected.accepted()


def _serve_with_caches(options: EngineOptions, caches: list[Path]) -> tuple[Served, str, str]:
    """Serve; the caches are that of the front process and that of its workers.

    The front process has read its own (``HF_HUB_CACHE``) when the module was imported. Once the
    configuration is built, that cache is removed and the processes still to come are told of the
    other one.
    """
    register_plugin()
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config
    drafts: list[Any] = []

    def created(args: EngineArgs, *rest: Any, **kwargs: Any) -> Any:
        config = create(args, *rest, **kwargs)
        shutil.rmtree(caches[0])
        os.environ["HF_HUB_CACHE"] = str(caches[1])
        drafts.append(config.speculative_config.draft_model_config)
        return config

    EngineArgs.create_engine_config = created
    with running_engine(options) as llm:
        return Served(drive(llm, REQUESTS)), drafts[0].model, drafts[0].revision


def test_worker_without_the_head(tmp_path: Path) -> None:
    child = Child({"HF_HUB_CACHE": str(tmp_path)})
    message = child.call(_find_head, HUB_ID, COMMIT)
    child.close()
    assert message.startswith(
        f"worker on {platform.node()}: head {HUB_ID!r} at revision {COMMIT!r} is no local folder"
    )
    assert "check the name, your network and token" in message
    assert "\n" not in message


def _find_head(model: str, revision: str) -> str:
    """Look for a head as a worker does; returns the error."""
    from vllm_vispec.heads.location import head_folder
    from vllm_vispec.utils.errors import ViSpecError

    try:
        head_folder(SimpleNamespace(model=model, revision=revision))
    except ViSpecError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_same_drafts_in_every_checkpoint_format(
    engine: Callable[..., Engine], tiny: TinyStore, tmp_path: Path
) -> None:
    """Converted heads and the other spelling of the method: draft for draft the same.

    The Automodel head has norms of its own: same text, other logits behind the drafts.
    """
    from vllm_vispec.heads.export import convert_head

    found: dict[tuple[str, str], tuple[Served, dict[Any, tuple[int, float, float]]]] = {}
    for written in ("reference", "automodel"):
        head = tiny.head(checkpoint_format=written)
        convert_head(Path(head), tmp_path / written)
        for name, folder, method in (
            ("own", head, "vispec"),
            ("eagle", head, "eagle"),
            ("canonical", str(tmp_path / written), "vispec"),
            ("canonical, eagle", str(tmp_path / written), "eagle"),
        ):
            drafting = engine("v1", **OPTIONS, draft=folder, method=method)
            found[written, name] = drafting.run(_serve_and_record)
    for (written, _), (served, drafts) in found.items():
        expected, expected_drafts = found[written, "own"]
        assert served.outputs() == expected.outputs()
        assert served.accepted() == expected.accepted()
        assert served.acceptance() > 0
        assert drafts.keys() == expected_drafts.keys()
        for key, row in drafts.items():
            assert row == pytest.approx(expected_drafts[key], rel=1e-5, abs=1e-4), key
    (one, one_drafts), (other, other_drafts) = (
        found[written, "own"] for written in ("reference", "automodel")
    )
    assert one.outputs() == other.outputs()
    shared = one_drafts.keys() & other_drafts.keys()
    assert max(abs(one_drafts[key][2] - other_drafts[key][2]) for key in shared) > 1


def _serve_and_record(llm: LLM) -> tuple[Served, dict[Any, tuple[int, float, float]]]:
    """Serve; each draft token with the mean and the largest magnitude of its logits."""
    with record(llm) as recorded:
        served = serve_requests(llm, mixed_requests(KIND, 8, 20))
    return served, {
        key: (int(row.argmax()), float(row.mean()), float(row.abs().max()))
        for key, row in recorded.rows.items()
    }

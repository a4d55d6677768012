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
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import ResolvedRevision

from tests.support.child import Child
from tests.support.engine import (
    EngineOptions,
    StartEngine,
    StartProcess,
    register_plugin,
    start,
    stop,
)
from tests.support.heads import write_config
from tests.support.runners import runners
from tests.support.spies import drafter
from tests.support.tiny_families import VOCAB
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import Served, drive, mixed_requests, serve_requests
from vllm_vispec.draft_vocab.files import write_vocab
from vllm_vispec.heads.export import convert_head
from vllm_vispec.heads.folder import DRAFT_VOCAB
from vllm_vispec.heads.location import head_folder
from vllm_vispec.utils.errors import ViSpecError

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

NUM_TOKENS = 3
HUB_ID, COMMIT = "org/head", 10 * "0123"
OPTIONS: Mapping[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
REQUESTS = mixed_requests(KIND, 6, 16)


@pytest.fixture(scope="module")
def head(tiny: TinyStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained draft's export that names its target by a relative path."""
    from vllm_vispec.heads.export import Export, export_head
    from vllm_vispec.heads.folder import load_draft

    folder = tmp_path_factory.mktemp("exported") / "head"
    made = {"command": "a test"}
    target = os.path.relpath(tiny.target())
    export_head(load_draft(tiny.head()), Export(folder, target, "float32", NUM_TOKENS, made))
    return folder


@pytest.mark.parametrize("runner", runners("v1", "v1-overlay"))
def test_answers_like_the_explicit_form(
    engine: StartEngine, tiny: TinyStore, head: Path, runner: str
) -> None:
    explicit = engine(runner, **OPTIONS, draft=str(head), num_draft_tokens=NUM_TOKENS)
    expected = explicit.run(serve_requests, REQUESTS)
    itself = engine(runner, **OPTIONS, model=str(head), per_request_spec_decode_metrics="detailed")
    found = itself.run(serve_requests, REQUESTS)
    assert itself.run(_model_and_drafter) == (str(tiny.target()), "ViSpecProposer")
    assert found.outputs() == expected.outputs()
    # K follows load and acceptance here, so steps need not be the same.
    assert max(drafted for drafted, _ in found.steps()) == NUM_TOKENS
    assert found.acceptance() > 0


def _model_and_drafter(llm: LLM) -> tuple[str, str]:
    return llm.llm_engine.model_config.model, type(drafter(llm)).__name__


def hub_snapshot_folder(cache: Path, repository: str) -> Path:
    """Return where the files of ``repository`` belong in the hub client's cache, as if downloaded.

    Args:
        cache: what ``HF_HUB_CACHE`` names.
    """
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots").mkdir()
    return folder / "snapshots" / COMMIT


def _copy(head: Path, folder: Path, target: str) -> str:
    """A head's config.json alone, with another target."""
    content = json.loads((head / "config.json").read_text())
    content["speculators_config"]["verifier"]["name_or_path"] = target
    folder.mkdir()
    write_config(folder, content)
    return str(folder)


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
        return {"kind": type(error).__name__, "error": str(error)}
    return {"model": model, "tokenizer": tokenizer, "settings": settings}


def test_what_vllm_makes_of_a_head_and_settings(
    tiny: TinyStore, head: Path, tmp_path: Path
) -> None:
    cache, target = tmp_path / "cache", str(tiny.target())
    # Downloads of heads, one of which names a folder, and of a target.
    _copy(head, hub_snapshot_folder(cache, "org/head"), str(head))
    snapshot = _copy(head, hub_snapshot_folder(cache, "a/b"), "a/target")
    _copy(head, hub_snapshot_folder(cache, "a/target"), target)
    absolute = _copy(head, tmp_path / "absolute", target)
    child = Child({"HF_HUB_CACHE": str(cache)})

    def resolve(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return dict(child.call(_resolve, *args, **kwargs))

    settings = {"method": "vispec", "num_speculative_tokens": NUM_TOKENS, "model": str(head)}
    assert resolve(str(head)) == {"model": target, "tokenizer": target, "settings": settings}
    assert resolve(target) == {"model": target, "tokenizer": None, "settings": None}
    # The user's settings win, except for method and head, which are what was asked to be served.
    given = {"num_speculative_tokens": 2, "method": "eagle", "image_table_size": 7}
    assert resolve(absolute, "mine", given) == {
        "model": target,
        "tokenizer": "mine",
        "settings": given | {"method": "vispec", "model": absolute},
    }
    # Offline, vLLM hands over the folder that the id has on this machine; it stays a hub id.
    found = resolve(snapshot)
    assert found["model"] == "a/target"
    assert (found["settings"]["model"], found["settings"]["revision"]) == ("a/b", COMMIT)
    for model, message in (
        (_copy(head, tmp_path / "missing", "../nowhere"), "there is no model in"),
        (
            _copy(head, tmp_path / "hub", "no-org/no-target"),
            "target 'no-org/no-target', which head",
        ),
        ("org/head", "as its target, which a head from a hub may not"),
    ):
        refused = resolve(model)
        assert refused["kind"] == "ViSpecError"
        assert message in refused["error"]
        assert "\n" not in refused["error"]
    child.close()


OTHER_PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


@pytest.mark.parametrize("runner", runners("v1", "v2", slow=["v2"]))
def test_worker_with_a_cache_of_its_own(
    engine: StartEngine, child: StartProcess, tiny: TinyStore, tmp_path: Path, runner: str
) -> None:
    # A list of draft tokens, of which every third is missing, comes with the head.
    head = tiny.head(seed=78)
    write_vocab(Path(head) / DRAFT_VOCAB, [token for token in range(VOCAB) if token % 3])
    auto: dict[str, Any] = {**OPTIONS, "num_draft_tokens": 4, "config": {"draft_vocab": "auto"}}
    expected = engine("v1", **auto, draft=head).run(serve_requests, REQUESTS)
    caches = [tmp_path / "front", tmp_path / "workers"]
    for cache in caches:
        shutil.copytree(head, hub_snapshot_folder(cache, HUB_ID))
    options = EngineOptions.of(model=str(tiny.target()), draft=HUB_ID, **auto)
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
    llm = start(options)
    found = Served(drive(llm, REQUESTS))
    stop(llm)
    return found, drafts[0].model, drafts[0].revision


def test_worker_without_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ViSpecError, match="check the name, your network and token") as error:
        head_folder(
            SimpleNamespace(model="no-org/no-head", revision=ResolvedRevision(COMMIT, COMMIT))
        )
    assert str(error.value).startswith(
        f"worker on {platform.node()}: draft 'no-org/no-head' at revision {COMMIT!r} is no local"
    )
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_same_drafts_in_every_checkpoint_format(
    engine: StartEngine, tiny: TinyStore, tmp_path: Path
) -> None:
    """Converted heads and the other spelling of the method."""
    image_rows: dict[str, Any] = {"global_feature": False, "num_query_tokens": 1}
    msd = tiny.head(checkpoint_format="msd", compressor="identity", **image_rows)
    heads = {name: tiny.head(checkpoint_format=name) for name in ("reference", "automodel")}
    for written, head in (heads | {"msd": msd}).items():
        named = written if written == "msd" else None
        convert_head(Path(head), tmp_path / written, source_format=named)
        expected: Served | None = None
        for folder in (head, str(tmp_path / written)):
            is_named = named is not None and folder == head
            config: dict[str, Any] = {"checkpoint_format": named} if is_named else {}
            config["adaptive"] = False
            for method in ("vispec",) if is_named else ("vispec", "eagle"):
                drafting = engine("v1", **OPTIONS, draft=folder, method=method, config=config)
                found: Served = drafting.run(serve_requests, REQUESTS)
                expected = expected or found
                assert found.outputs() == expected.outputs()
                assert found.accepted() == expected.accepted()
                assert found.acceptance() > 0

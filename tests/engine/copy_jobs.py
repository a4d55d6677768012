"""Child-process job that watches whole engine steps for copies between host and device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tests.engine.workloads import Request, Results, drive, forget, image_text, words
from tests.support import engine
from tests.support.copy_watch import CopyWatch, mark_host_buffers

if TYPE_CHECKING:
    from vllm import LLM


def requests_of(kind: str) -> list[Request]:
    """Return text, images that the engine's budget splits, and one request that is sampled."""
    return [
        Request("text", words(1, 40), (), 12),
        Request("image", f"{image_text(kind, 1)} {words(2, 9)}", (2,), 12),
        Request("images", f"{words(3, 9)} {image_text(kind, 2)} {words(4, 9)}", (3, 4), 12),
        Request("sampled", f"{image_text(kind, 1)} {words(5, 30)}", (4,), 12, {"temperature": 0.8}),
    ]


def watch(kind: str, engines: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Serve the same requests without and with the watch, in one engine after another."""
    engine.prepare_process()
    _upload_as_on_a_gpu()
    for name, options in engines.items():
        with engine.engine(engine.EngineOptions(**options)) as llm:
            plain = _serve(llm, kind)
            copies = CopyWatch()
            mark_host_buffers()
            _watch_steps(llm, copies)
            found = _serve(llm, kind)
            yield {
                "engine": name,
                "uploads": dict(copies.uploads),
                "violations": dict(copies.violations),
                "same": _ids(found) == _ids(plain),
                "accepted": sum(sum(rows[0].accepted_draft) for rows in found.values()),
            }


def _upload_as_on_a_gpu() -> None:
    """Undo what vLLM's CPU workers change: there an upload and its buffer are the host's own."""
    from vllm.utils import torch_utils

    upload = torch_utils.async_tensor_h2d
    from vllm.v1.worker.cpu import shm  # noqa: F401

    torch_utils.async_tensor_h2d = upload
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    CPUModelRunner._postprocess_tensors = lambda self: None


def _watch_steps(llm: LLM, copies: CopyWatch) -> None:
    step = llm.llm_engine.step

    def watched_step() -> Any:
        with copies.watching():
            return step()

    llm.llm_engine.step = watched_step


def _serve(llm: LLM, kind: str) -> Results:
    forget(llm)
    return drive(llm, requests_of(kind))


def _ids(results: Results) -> dict[str, list[int]]:
    return {name: rows[0].token_ids for name, rows in results.items() if name != "sampled"}

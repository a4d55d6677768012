"""No operator of a speculative step copies between host and device but the uploads listed here.

Whole engine steps are watched on a CPU by the marks of :mod:`tests.support.copy_watch`: prompts
that are split, images, decoding, and one sampled request. Judged is what this package calls; what
vLLM's own code copies is vLLM's, also where it is called from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

from tests.support.copy_watch import CopyWatch, mark_host_buffers
from tests.support.drafts import DRAFTS, Draft
from tests.support.engine import StartEngine, StartProcess
from tests.support.runners import marks
from tests.support.tiny_store import GATED, KIND, UNCOMPRESSED, TinyStore
from tests.support.workloads import Request, image_text, serve_requests, words

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

ROWS = "spec_decode/row_table.py:set_step"
TOKENS = "spec_decode/row_table.py:_put_image_tokens"
EMBEDS = "models/uncompressed.py:embed_input_ids"
# By draft: at most one copy a step of each, from pinned memory.
UPLOADS = {
    "chain": {ROWS},
    "tree": {ROWS},
    # Where an image's tokens stand, once per image; what the gate decided, once per request.
    "gated": {ROWS, "compressors/gated.py:set_step", "compressors/gated.py:decide", TOKENS},
    "concat": {ROWS, TOKENS},
    # Where an image's embeddings go.
    "no_compress": {ROWS, EMBEDS},
    # V1 where `disable_padded_drafter_batch` takes rejected tokens out of the draft's batch.
    "unpadded": {ROWS, EMBEDS},
    "draft_vlm": {ROWS, EMBEDS},
}
# V1 tells the device which tree each request has; on V2 the device knows.
V1_UPLOADS = {"tree": {"v1/tree_verification.py:_find_batch"}}
CONCAT = GATED | {"compressor": "concat(resampler:2,conv:2,pool:3)"}
UNPADDED = {"config": {"disable_padded_drafter_batch": True}}
ALL_DRAFTS = {**DRAFTS, "concat": Draft(CONCAT), "unpadded": Draft(UNCOMPRESSED, UNPADDED)}
CASES = [
    pytest.param(runner, name, id=f"{runner}-{name}", marks=marks(runner, slow))
    for runners, names, slow in (
        ("v2 v1-overlay v2-overlay", "chain tree", False),
        ("v1", "chain tree unpadded", True),
        ("v1 v2", "gated concat no_compress draft_vlm", True),
    )
    for runner in runners.split()
    for name in names.split()
]
# Text, images that the engine's budget splits, and one request that is sampled.
REQUESTS = [
    Request("text", words(1, 40), (), 12),
    Request("image", f"{image_text(KIND, 1)} {words(2, 9)}", (2,), 12),
    Request("images", f"{words(3, 9)} {image_text(KIND, 2)} {words(4, 9)}", (3, 4), 12),
    Request("sampled", f"{image_text(KIND, 1)} {words(5, 30)}", (4,), 12, {"temperature": 0.8}),
]


@pytest.mark.parametrize(("runner", "name"), CASES)
def test_listed_uploads_only(
    engine: StartEngine, child: StartProcess, tiny: TinyStore, runner: str, name: str
) -> None:
    child(runner, process="copies").call(_upload_as_on_a_gpu)
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 48}
    ours = engine(runner, process="copies", **sizes, **ALL_DRAFTS[name].of(tiny))
    plain = ours.run(serve_requests, REQUESTS)
    found, uploads, violations = ours.run(_watch)
    listed = UPLOADS[name] | (V1_UPLOADS.get(name, set()) if runner.startswith("v1") else set())
    assert violations == {}
    assert set(uploads) == listed
    assert found.acceptance() > 0
    for request, expected in plain.outputs().items():
        assert request == "sampled" or found.outputs()[request] == expected


# What follows runs in the child.


def _upload_as_on_a_gpu() -> None:
    """Undo what vLLM's CPU workers change: there an upload and its buffer are the host's own."""
    from vllm.utils import torch_utils

    upload = torch_utils.async_tensor_h2d
    from vllm.v1.worker.cpu import shm  # noqa: F401

    torch_utils.async_tensor_h2d = upload
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    CPUModelRunner._postprocess_tensors = lambda self: None


def _watch(llm: LLM) -> tuple[Any, dict[str, int], dict[str, int]]:
    copies, step = CopyWatch(), llm.llm_engine.step
    mark_host_buffers()

    def watched_step() -> Any:
        with copies.watching():
            return step()

    with patch.object(llm.llm_engine, "step", watched_step):
        found = serve_requests(llm, REQUESTS)
    return found, dict(copies.uploads), dict(copies.violations)

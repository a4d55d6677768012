"""`vispec verify` on this machine: the attention check can fail; the command on real engines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.support.child import REPOSITORY, Child
from tests.support.runners import V1_ENV
from vllm_vispec.verify.result import (
    CHAIN,
    TOLERANCE,
    TREE,
    AttentionCase,
    AttentionError,
    Verification,
)
from vllm_vispec.verify.run import SHIPPED_PAIR

pytestmark = pytest.mark.engine
SECONDS = 900
_HEADS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2}
CASES = (
    AttentionCase(feature=CHAIN, head_size=64, padded_size=72, decode_rows=1, **_HEADS),
    AttentionCase(feature=TREE, head_size=128, padded_size=152, decode_rows=30, **_HEADS),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_attention_check_sees_a_leak(child: Any, dtype: str) -> None:
    """Seen on the CPU's backend: 3e-6 in float32, 9e-3 in bfloat16; 0.9 and more with a leak."""
    found = child("v1").call(_attention_errors, SHIPPED_PAIR[0], dtype)
    assert len(found) == len(CASES)
    for case, errors in zip(CASES, found, strict=True):
        whole: AttentionError = errors["as it is"]
        assert whole.used_size is not None
        assert whole.used_size >= case.padded_size
        assert whole.reason is None
        assert 0 < whole.worst <= TOLERANCE[dtype]
        assert errors["no channels"].worst > 10 * TOLERANCE[dtype]
        assert errors["NaN"].worst > 1e6


@pytest.mark.slow
def test_cudas_backends_with_stand_ins() -> None:
    """Triton's kernels run interpreted, in float32; the others are built, down to the KV cache."""
    child = Child(V1_ENV | {"TRITON_INTERPRET": "1"})
    errors, sizes = child.call(_cuda_attention, SHIPPED_PAIR[0])
    child.close()
    assert [(case, size) for case, size, _ in errors] == [("chain", 72), ("tree", 152)]
    assert all(0 < worst <= TOLERANCE["float32"] for _, _, worst in errors)
    assert sizes == {
        "FLASH_ATTN": [72, 152],
        "FLASHINFER": [128, 256],
        "TRITON_ATTN": [72, 152],
        "FLEX_ATTENTION": [72, 152],
    }


@pytest.mark.slow
def test_the_command_on_the_shipped_pair(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    arguments = ["verify", "--dtype", "float32", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "vllm_vispec", *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = Verification.model_validate_json(output.read_text())
    assert found.exit_status == 0
    verdicts = {one.feature: one.state for one in found.verdicts}
    assert verdicts == {"chain": "passed", "tree": "passed"}
    assert found.differences == {"chain": (), "tree": ()}
    for engine in found.engines:
        assert engine.error is None
        assert engine.state is not None
        assert engine.state.dtype == "float32"
        assert sum(layers.count for layers in engine.state.target) == 24
        assert engine.timings["target_step"] > 0
        assert Path(engine.log).is_file()
        counts = {batch: len(answers) for batch, answers in engine.answers.items()}
        assert counts == {"alone": 8, "together": 8}
    plain, chain, tree = found.engines
    assert plain.acceptance is None
    for engine in (chain, tree):
        assert engine.acceptance is not None
        assert engine.acceptance.acceptance_length > 2.5
        assert engine.timings["draft_step"] > 0
        assert engine.state is not None
        assert engine.state.draft[0].padded_size > engine.state.draft[0].head_size
    assert tree.state is not None
    assert tree.state.target[0].padded_size > tree.state.target[0].head_size
    backends = {one.case.feature: one.backend for one in found.attention}
    assert backends == {"chain": "CPU_ATTN", "tree": "CPU_ATTN"}
    page = output.with_suffix(".txt").read_text()
    assert "**tree: passed** (16 of 16 answers equal, 0 differ within noise, 0 wrong)" in page


# What follows runs in the child.


def _attention_errors(target: str, dtype: str) -> list[dict[str, AttentionError]]:
    """Return each case's errors: as it is, without keys' channels, and with NaN in the values."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_vispec.verify import attention

    config = EngineArgs(model=target, dtype=dtype, max_model_len=1024).create_engine_config()
    make = attention.make_requests

    def without_channels(case: AttentionCase, *args: Any) -> Any:
        requests = make(case, *args)
        for request in requests:
            request.key[..., case.head_size :] = 0
        return requests

    def with_nan(case: AttentionCase, *args: Any) -> Any:
        requests = make(case, *args)
        requests[0].value[0] = float("nan")
        return requests

    changes = {"as it is": make, "no channels": without_channels, "NaN": with_nan}
    found: list[dict[str, AttentionError]] = [{} for _ in CASES]
    for name, changed in changes.items():
        with mock.patch.object(attention, "make_requests", changed):
            for errors, case in zip(found, CASES, strict=True):
                errors[name] = attention.check_attention(config, case, "CPU_ATTN")
    return found


def _cuda_attention(
    target: str,
) -> tuple[list[tuple[str, int | None, float]], dict[str, list[int]]]:
    """Return what comes of CUDA's backends with stand-ins; only Triton's kernels run."""
    from tests.support import cuda_stand_in

    platform = cuda_stand_in.install()
    platform.device_type = "cpu"
    # vLLM's custom operators of attention exist for CUDA alone.
    platform.opaque_attention_op = classmethod(lambda cls: False)
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_vispec.verify import attention
    from vllm_vispec.verify.run import BACKENDS

    config = EngineArgs(
        model=target, dtype="float32", max_model_len=256, max_num_seqs=32
    ).create_engine_config()
    with (
        mock.patch.object(attention, "PROMPTS", (17, 33, 50)),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
    ):
        checked = [attention.check_attention(config, case, "TRITON_ATTN") for case in CASES]
    errors = [
        (case.feature, one.used_size, one.worst) for case, one in zip(CASES, checked, strict=True)
    ]
    config.model_config.dtype = torch.bfloat16
    sizes: dict[str, list[int]] = {}
    for backend in BACKENDS["cuda"]:
        backend_class = AttentionBackendEnum[backend].get_class()
        for case in CASES:
            with set_current_vllm_config(config):
                size, _ = attention._find_head_size(config, backend_class, case)
            assert size is not None
            cpu = torch.device("cpu")
            layer = attention.PagedLayer.build(config, backend_class, case, size, cpu)
            assert layer.group.get_metadata_builder(0) is not None
            sizes.setdefault(backend, []).append(size)
    return errors, sizes

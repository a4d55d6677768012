"""What the plugin says about settings, without building a configuration."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.heads import BASE
from vllm_vispec.heads.target import tensor_parallel_sizes
from vllm_vispec.spec_decode.checks import check_keys
from vllm_vispec.utils.errors import ViSpecError


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sizes"),
    [
        (4, 4, [1, 2, 4]),
        (4, 1, [1, 2, 4]),
        (16, 2, [1, 2, 4, 8, 16]),
        (28, 4, [1, 2, 4, 28]),
        (12, 3, [1, 3, 6, 12]),
    ],
)
def test_key_value_heads_are_divided_or_repeated(
    heads: int, kv_heads: int, sizes: list[int]
) -> None:
    head = replace(
        BASE, hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    assert tensor_parallel_sizes(head) == sizes


@pytest.mark.parametrize("filled_by_vllm", ["target_model_config", "draft_parallel_config"])
def test_known_keys(filled_by_vllm: str) -> None:
    known = {"method": "vispec", "model": "m", "num_speculative_tokens": 4, "tree": {}}
    check_keys(known)
    with pytest.raises(ViSpecError, match=f'key "{filled_by_vllm}" is unknown'):
        check_keys(known | {filled_by_vllm: None})


def test_only_commands_of_vllm_lose_their_traceback() -> None:
    import vllm

    from vllm_vispec.compat.command_errors import is_vllm_command

    package = Path(vllm.__file__).parent
    assert is_vllm_command(["/usr/bin/vllm", "serve"])
    assert is_vllm_command([str(package / "entrypoints" / "openai" / "api_server.py")])
    for program in ("my_job.py", "-c", sys.executable):
        assert not is_vllm_command([program])
    assert not is_vllm_command([])

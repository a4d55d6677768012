"""The ways in which vLLM's command line takes a speculative config."""

from __future__ import annotations

import pytest

from tests.support.engine import StartProcess, register_plugin
from tests.support.tiny_store import TinyStore

DOTTED = "--speculative-config."


@pytest.mark.parametrize("flag", [DOTTED, "-sc."])
def test_dotted_flags(child: StartProcess, tiny: TinyStore, flag: str) -> None:
    """Our keys and vLLM's, nested ones and dashes too, arrive as those of one JSON object do."""
    settings = {"method": "vispec", "model": tiny.head(), "num-speculative-tokens": "7"}
    settings |= {"tree.policy": "eagle2", "tree.depth": "3", "tree.top_k": "2"}
    arguments = ["--model", str(tiny.target()), "--dtype", "float32"]
    for name, value in settings.items():
        arguments += [flag + name, value]
    count, tree = child("v1").call(_configure, arguments)
    assert count == 7
    assert tree == {"policy": "eagle2", "depth": 3, "top_k": 2, "threshold": None}


# What follows runs in the child.


def _configure(arguments: list[str]) -> tuple[int, dict[str, object]]:
    """Return the number of draft tokens and the tree of the engine that these flags ask for."""
    register_plugin()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    given = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(arguments)
    config = EngineArgs.from_cli_args(given).create_engine_config()
    return config.speculative_config.num_speculative_tokens, config.additional_config["vispec"][
        "tree"
    ]

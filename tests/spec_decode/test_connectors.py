"""Images whose features are not at hand: what the log says, with and without a KV connector."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig

from tests.spec_decode.test_adaptor import Parts, head_folder, run_of
from vllm_vispec.spec_decode.connectors import PREFILL_HERE, RAISE_TABLE, receiving_connector
from vllm_vispec.spec_decode.image_table import ImageTable
from vllm_vispec.spec_decode.layout import FeatureSlice

NIXL = "NixlConnector"


def transfer(role: str) -> Any:
    return KVTransferConfig(kv_connector=NIXL, kv_role=role)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, None),
        (KVTransferConfig(), None),
        (transfer("kv_producer"), None),
        (transfer("kv_consumer"), NIXL),
        (transfer("kv_both"), NIXL),
    ],
)
def test_a_producer_gets_no_prompts_from_elsewhere(given: Any, found: str | None) -> None:
    assert receiving_connector(given) == found


def table_of(connector: str | None) -> ImageTable:
    """A table of two slots."""
    parts = Parts(head_folder(2), num_slots=3)
    return ImageTable(parts.rows, parts.fusion, parts.adaptor, connector)


def warning_of(
    caplog: pytest.LogCaptureFixture, connector: str | None, known: tuple[str, ...] = ()
) -> str:
    """What is said about a missing image by a table of two slots, given those it has seen."""
    table = table_of(connector)
    embeds = {name: torch.randn(4, 64) for name in known}
    for name in known:
        table.slot_of(run_of(FeatureSlice(name, 0, 4)), embeds)
    missing = run_of(FeatureSlice("picture", 0, 4))
    assert table.slot_of(missing, {}) is None
    table.count_miss(missing)
    return str(caplog.messages[-1])


def test_without_a_connector_the_table_is_too_small(caplog: pytest.LogCaptureFixture) -> None:
    said = warning_of(caplog, None, ("a", "b"))
    assert "picture" in said
    assert said.endswith(f"Output is unaffected, acceptance is. {RAISE_TABLE}")
    assert len(caplog.messages) == 1


def test_behind_a_connector_the_size_of_the_table_does_not_help(
    caplog: pytest.LogCaptureFixture,
) -> None:
    said = warning_of(caplog, NIXL, ("a",))
    assert said.endswith(PREFILL_HERE.format(connector=NIXL))
    assert "image_table_size" not in said


def test_behind_a_connector_a_full_table_may_be_to_blame(caplog: pytest.LogCaptureFixture) -> None:
    """Where the connector brings back what this engine had offloaded."""
    said = warning_of(caplog, NIXL, ("a", "b"))
    assert PREFILL_HERE.format(connector=NIXL) in said
    assert said.endswith(f"the table was too small: {RAISE_TABLE}")


def test_a_connector_is_named_once_at_start(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    table_of(NIXL)
    (said,) = caplog.messages
    assert NIXL in said
    assert "acceptance is lower" in said
    # A head without an adaptor reads no features of images behind their rows.
    ImageTable(Parts(head_folder(2)).rows, None, None, NIXL)
    assert len(caplog.messages) == 1

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


@pytest.mark.parametrize(
    ("connector", "known", "said"),
    [
        (None, "ab", f"Output is unaffected, acceptance is. {RAISE_TABLE}"),
        # The size of the table does not help.
        (NIXL, "a", PREFILL_HERE.format(connector=NIXL)),
        # Where the connector brings back what this engine had offloaded, a full table may be it.
        (
            NIXL,
            "ab",
            f"{PREFILL_HERE.format(connector=NIXL)} If it did prefill them, the table was too "
            f"small: {RAISE_TABLE}",
        ),
    ],
)
def test_a_missing_image_and_the_remedy_are_named(
    caplog: pytest.LogCaptureFixture, connector: str | None, known: str, said: str
) -> None:
    table = table_of(connector)
    for name in known:
        table.slot_of(run_of(FeatureSlice(name, 0, 4)), {name: torch.randn(4, 64)})
    caplog.clear()
    missing = run_of(FeatureSlice("picture", 0, 4))
    assert table.slot_of(missing, {}) is None
    table.count_miss(missing)
    (message,) = caplog.messages
    assert "picture" in message
    assert message.endswith(said)


def test_a_connector_is_named_once_at_start(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    table_of(NIXL)
    (said,) = caplog.messages
    assert NIXL in said
    assert "acceptance is lower" in said
    # A head without an adaptor reads no features of images behind their rows.
    ImageTable(Parts(head_folder(2)).rows, None, None, NIXL)
    assert len(caplog.messages) == 1

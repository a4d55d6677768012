"""The engine's adaptor, fused input and image table against the plain draft module.

And what the log says of images whose features are not at hand, with and without a KV connector.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import KVTransferConfig

from tests.support.golden import load_cases
from vllm_vispec.heads.folder import inspect_head, iter_canonical_tensors, load_draft
from vllm_vispec.spec_decode.adaptor import ImageAdaptor, TextFusion, merge_partials
from vllm_vispec.spec_decode.connectors import PREFILL_HERE, RAISE_TABLE, receiving_connector
from vllm_vispec.spec_decode.image_table import ImageTable
from vllm_vispec.spec_decode.layout import FeatureSlice, ImageRun
from vllm_vispec.spec_decode.row_table import RowTable
from vllm_vispec.spec_decode.step import DraftStep, RowIds

TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


def head_folder(query_tokens: int) -> Path:
    drafts = {case.draft_dir for case in load_cases()}
    return next(d for d in sorted(drafts) if d.name == f"qwen_draft_q{query_tokens}")


class Parts:
    """Fusion, table and adaptor loaded from a head, without vLLM's layers."""

    def __init__(self, folder: Path, num_slots: int = 4) -> None:
        info = inspect_head(folder)
        head, weights = info.config, dict(iter_canonical_tensors(info))
        self.ids = RowIds(num_slots, head.num_query_tokens)
        self.fusion = TextFusion(head.hidden_size)
        self.rows = RowTable(self.ids, head.hidden_size, 64)
        self.adaptor = ImageAdaptor(head)
        self.fusion.load({k: v for k, v in weights.items() if k.startswith(("fc.", "img_fc."))})
        prefix = "img_adaptor."
        self.adaptor.load_state_dict(
            {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
        )
        self.rows.write_image(0, self.fusion.offset(torch.zeros(head.hidden_size)))
        self.adaptor.fold_queries()
        self.table = ImageTable(self.rows, self.fusion, self.adaptor)

    def set_ids(self, *row_ids: int) -> None:
        self.rows.set_step(DraftStep(torch.tensor(row_ids, dtype=torch.int32)))


def run_of(*parts: FeatureSlice) -> ImageRun:
    return ImageRun(3, 3 + sum(part.stop - part.start for part in parts), parts)


@pytest.mark.parametrize("query_tokens", [2, 4])
def test_rows_match_the_plain_module(query_tokens: int) -> None:
    folder = head_folder(query_tokens)
    parts, plain = Parts(folder), load_draft(folder, dtype=torch.float32)
    torch.manual_seed(0)
    embeds, e, h = torch.randn(9, 64), torch.randn(5, 64), torch.randn(5, 64)
    slot = parts.table.slot_of(run_of(FeatureSlice("a", 0, 9)), {"a": embeds})
    assert slot is not None
    with torch.no_grad():
        rows = plain.adaptor(embeds)
        expected = plain.layer_input(e, h, rows[-1].expand_as(h))
        no_image = plain.layer_input(e, h, torch.zeros_like(h))
    first = parts.ids.text(slot)
    compact = parts.rows.offset[first + 1 : first + query_tokens]
    torch.testing.assert_close(compact, rows[:-1], **TOLERANCE)
    for row_id, wanted in ((first, expected), (parts.ids.text(0), no_image)):
        parts.set_ids(*[row_id] * 5)
        found = parts.rows.layer_input(parts.fusion.fuse(e, h))
        torch.testing.assert_close(found, wanted, **TOLERANCE)


def test_partials_merge_to_attention_over_everything() -> None:
    adaptor = Parts(head_folder(4)).adaptor
    torch.manual_seed(1)
    embeds = torch.randn(20, 64)
    whole = adaptor.attend(embeds).value
    pieces = [adaptor.attend(piece) for piece in embeds.split([3, 16, 1])]
    torch.testing.assert_close(merge_partials(pieces), whole, **TOLERANCE)


def test_deepstack_columns_are_ignored() -> None:
    adaptor = Parts(head_folder(2)).adaptor
    embeds = torch.randn(6, 64)
    wide = torch.cat([embeds, torch.randn(6, 128)], dim=1)
    torch.testing.assert_close(adaptor.attend(wide).value, adaptor.attend(embeds).value)


def test_image_tokens_and_masked_positions_replace_the_text_input() -> None:
    parts = Parts(head_folder(2))
    parts.set_ids(1, parts.ids.masked, 0)
    fused = torch.randn(3, 64)
    mixed = parts.rows.layer_input(fused)
    torch.testing.assert_close(mixed[0], parts.rows.offset[1])
    torch.testing.assert_close(mixed[1], torch.zeros(64))
    assert parts.rows.key_mask_of(3).flatten().tolist() == [0.0, -64.0, 0.0]
    parts.rows.select_rows(torch.tensor([1]))
    assert parts.rows.key_mask_of(1).tolist() == [[-64.0]]


def test_products_are_formed_where_the_weights_are() -> None:
    """Loaders hand out the host's tensors; here the meta device stands in for a GPU."""
    found: list[str] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.mm.default, torch.ops.aten.mv.default):
                found.append(result.device.type)
            return result

    weights = {
        "fc.weight": torch.randn(8, 16),
        "img_fc.weight": torch.randn(8, 16),
        "img_fc.bias": torch.randn(8),
    }
    fusion = TextFusion(8).to("meta")
    with Products():
        fusion.load(weights)
    assert found == ["meta"] * 3


def test_table_keeps_the_recent_and_evicts_the_oldest() -> None:
    table = Parts(head_folder(2), num_slots=3).table
    embeds = {name: torch.randn(4, 64) for name in "abc"}
    runs = {name: run_of(FeatureSlice(name, 0, 4)) for name in "abc"}
    slots = {name: table.slot_of(runs[name], embeds) for name in "ab"}
    table.begin_step()
    assert table.slot_of(runs["a"], {}) == slots["a"]
    assert table.slot_of(runs["c"], embeds) == slots["b"]
    assert table.slot_of(runs["b"], embeds) is None  # this batch already needs both slots
    assert table.stats.evicted == 1
    table.clear()
    assert table.slot_of(runs["a"], {}) is None


def test_touching_images_need_not_be_at_hand_together() -> None:
    first, second = torch.randn(5, 64), torch.randn(3, 64)
    run = run_of(FeatureSlice("a", 0, 5), FeatureSlice("b", 0, 3))
    apart, together = Parts(head_folder(2)), Parts(head_folder(2))
    assert apart.table.slot_of(run, {"a": first}) is None
    slot = apart.table.slot_of(run, {"b": second})
    assert slot == together.table.slot_of(run, {"a": first, "b": second})
    torch.testing.assert_close(apart.rows.offset, together.rows.offset)


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

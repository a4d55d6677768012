"""The demo's and the benchmarks' arithmetic, without an engine."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from examples.demo.compare import Exchange, summarise
from examples.demo.job import Answer
from examples.demo.page import render_page
from examples.tiny_vlm.samples import DemoSample
from tests.support.heads import write_head
from vllm_vispec.bench.heads import fused_fc, write_eagle_head

PLAIN = Answer(
    token_ids=(5, 6, 7, 8, 9, 2),
    pieces=("a", "<b>", " c", " d", " e", ""),
    per_step_accepted=(),
    decode_seconds=1.0,
    wall_seconds=1.4,
)
VISPEC = replace(PLAIN, per_step_accepted=(2, 0, 3), decode_seconds=0.4, wall_seconds=0.9)


def test_tokens_know_their_round() -> None:
    assert VISPEC.steps() == [None, 1, 1, None, None, 3]
    assert PLAIN.steps() == [None] * 6


def test_answer_survives_json() -> None:
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(VISPEC).items()}
    assert Answer.from_json(fields) == VISPEC


def test_summary() -> None:
    summary = summarise([Exchange(0, (PLAIN, PLAIN), (VISPEC, VISPEC))], 3)
    assert (summary.identical, summary.total) == (1, 1)
    assert summary.decode_speedup == pytest.approx(2.5)
    assert summary.e2e_speedup == pytest.approx(1.4 / 0.9)
    assert summary.acceptance_length == pytest.approx(1 + 5 / 3)
    assert summary.acceptance_rate_per_position == pytest.approx((2 / 3, 2 / 3, 1 / 3))
    assert (summary.plain_ttft, summary.vispec_ttft) == pytest.approx((0.4, 0.5))


def test_one_different_repetition_is_a_difference() -> None:
    other = replace(VISPEC, token_ids=(5, 6, 7, 8, 9, 3))
    assert not Exchange(0, (PLAIN, PLAIN), (VISPEC, other)).is_identical


def test_page_is_escaped_and_self_contained() -> None:
    sample = DemoSample("charts", [{"role": "user", "content": []}], [], "a<b> c d e")
    exchange = Exchange(0, (PLAIN,), (VISPEC,))
    page = render_page(summarise([exchange], 3), [sample], [exchange], "settings")
    assert "&lt;b&gt;" in page
    assert "matches the reference" in page
    assert page.count('title="drafted in step 1"') == 2
    assert "http" not in page


def test_eagle_head_fuses_like_vispec_without_image(tmp_path: Path) -> None:
    write_head(tmp_path / "vispec")
    folder = write_eagle_head(str(tmp_path / "vispec"), "unread", tmp_path / "eagle")
    assert Path(folder, "config.json").is_file()
    torch.manual_seed(0)
    embedding, hidden = torch.randn(2, 8)
    source = {"fc.weight": torch.randn(8, 16), "img_fc.weight": torch.randn(8, 16)}
    inner = source["img_fc.weight"] @ torch.cat((hidden, torch.zeros(8)))
    expected = source["fc.weight"] @ torch.cat((embedding, inner))
    found = fused_fc(source) @ torch.cat((embedding, hidden))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

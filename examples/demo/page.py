"""The demo's result as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL.Image import Image

from examples.demo.compare import Exchange, Summary
from examples.demo.job import Answer
from examples.tiny_vlm.samples import DemoSample

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fbfbf9; --card: #fff; --line: #d9dbd6;
  --soft: #62686e; --draft: #bfe6cf; --draft-ink: #0b4a2b; --own: #f6dcae; --own-ink: #5c3a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --paper: #15181b; --card: #1e2226;
  --line: #343a40; --soft: #a2a9b0; --draft: #1f5138; --draft-ink: #d5f5e2; --own: #5a4318;
  --own-ink: #fdeccb; } }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.2rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem; }
.soft { color: var(--soft); } table { border-collapse: collapse; margin: .6rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .9rem .3rem 0; text-align: right;
  font-variant-numeric: tabular-nums; } th:first-child, td:first-child { text-align: left; }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.figure { border: 1px solid var(--line); border-radius: .5rem; background: var(--card);
  padding: .6rem 1rem; min-width: 8rem; } .figure b { display: block; font-size: 1.5rem; }
article { display: grid; grid-template-columns: 12rem 1fr; gap: 1.2rem; margin: 0 0 1rem;
  border: 1px solid var(--line); border-radius: .5rem; background: var(--card); padding: 1rem; }
article img { width: 100%; image-rendering: pixelated; border-radius: .25rem; }
article p { margin: 0 0 .5rem; } .noimage { color: var(--soft); font-style: italic; }
.answer { font: 15px/2 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.t { padding: .15em 0; border-radius: .2em; margin-right: 1px; }
.d { background: var(--draft); color: var(--draft-ink); }
.o { background: var(--own); color: var(--own-ink); border-bottom: 2px solid currentColor; }
@media (max-width: 40rem) { article { grid-template-columns: 1fr; } }
"""

LEGEND = (
    '<p class="answer"><span class="t d">drafted and accepted</span> proposed by the ViSpec head, '
    'confirmed by the target&#10;<span class="t o">target\'s own</span> one at the end of every '
    "step, underlined</p>"
)


def render_page(
    summary: Summary, samples: Sequence[DemoSample], exchanges: Sequence[Exchange], settings: str
) -> str:
    """Return the page; images are inlined, nothing is loaded from elsewhere."""
    cards = "\n".join(_card(samples[exchange.sample], exchange) for exchange in exchanges)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ViSpec demo</title><style>{STYLE}</style></head><body>"
        "<h1>ViSpec: the same answers, in fewer target passes</h1>"
        f'<p class="soft">{escape(settings)}</p>{_figures(summary)}{_numbers(summary)}'
        f"<h2>Where every token came from</h2>{LEGEND}\n{cards}\n</body></html>\n"
    )


def _figures(summary: Summary) -> str:
    figures = {
        "identical outputs": f"{summary.identical}/{summary.total}",
        "decode_speedup": f"{summary.decode_speedup:.2f}×",
        "e2e_speedup": f"{summary.e2e_speedup:.2f}×",
        "acceptance_length": f"{summary.acceptance_length:.2f}",
    }
    cells = "".join(f'<div class="figure"><b>{v}</b>{k}</div>' for k, v in figures.items())
    return f'<div class="figures">{cells}</div>'


def _numbers(summary: Summary) -> str:
    rows = {
        "decode, tokens/s": (summary.plain_tokens_per_second, summary.vispec_tokens_per_second),
        "TTFT, ms (median)": (1000 * summary.plain_ttft, 1000 * summary.vispec_ttft),
        "mean output, tokens": (summary.output_tokens, summary.output_tokens),
    }
    body = "".join(
        f"<tr><td>{name}</td><td>{plain:.1f}</td><td>{vispec:.1f}</td></tr>"
        for name, (plain, vispec) in rows.items()
    )
    positions = range(1, len(summary.acceptance_rate_per_position) + 1)
    head = "".join(f"<th>{position}</th>" for position in positions)
    shares = "".join(
        f"<td>{100 * share:.0f} %</td>" for share in summary.acceptance_rate_per_position
    )
    return (
        f"<table><tr><th></th><th>plain vLLM</th><th>ViSpec</th></tr>{body}</table>"
        f"<table><tr><th>position</th>{head}</tr>"
        f"<tr><td>acceptance rate</td>{shares}</tr></table>"
    )


def _card(sample: DemoSample, exchange: Exchange) -> str:
    answer = exchange.vispec[-1]
    steps = max(len(answer.per_step_accepted), 1)
    is_right = answer.text.strip() == sample.reference.strip()
    facts = (
        sample.family,
        f"{len(answer.token_ids)} tokens in {steps} steps",
        "identical to plain vLLM" if exchange.is_identical else "DIFFERS from plain vLLM",
        "matches the reference" if is_right else "differs from the reference",
    )
    return (
        f"<article><div>{_images(sample.images)}</div><div>{_dialogue(sample)}"
        f'<p class="answer">{_tokens(answer)}</p><p class="soft">{escape(" · ".join(facts))}</p>'
        "</div></article>"
    )


def _dialogue(sample: DemoSample) -> str:
    lines = []
    for message in sample.messages:
        text = " ".join(part["text"] for part in message["content"] if part["type"] == "text")
        lines.append(f"<p><b>{escape(message['role'])}:</b> {escape(text)}</p>")
    return "".join(lines)


def _tokens(answer: Answer) -> str:
    spans = []
    for piece, drafted_in in zip(answer.pieces, answer.steps(), strict=True):
        if piece:
            kind = "o" if drafted_in is None else "d"
            title = "target's own" if drafted_in is None else f"drafted in step {drafted_in}"
            spans.append(f'<span class="t {kind}" title="{title}">{escape(piece)}</span>')
    return "".join(spans)


def _images(images: Sequence[Image]) -> str:
    if not images:
        return '<p class="noimage">text only</p>'
    return "".join(f'<img alt="input image" src="{_data_url(image)}">' for image in images)


def _data_url(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

"""Describe an image with a ViSpec head, in this process: `python -m examples.offline_generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from examples.pair import DraftOption, DraftTokensOption, ModelOption, Pair, start_llm
from examples.pictures import load_picture
from examples.tiny_vlm.shipped import DRAFT_TOKENS, HEAD, TARGET


def main(
    model: ModelOption = TARGET,
    draft_model: DraftOption = HEAD,
    num_speculative_tokens: DraftTokensOption = DRAFT_TOKENS,
    image: Annotated[Path | None, typer.Option(help="Image file; default: a drawn scene.")] = None,
    question: Annotated[str, typer.Option()] = "Describe the picture.",
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Answer one question about one image."""
    pair = Pair(model, draft_model, num_speculative_tokens)
    llm = start_llm(pair, per_request_spec_decode_metrics="summary", disable_log_stats=False)
    from vllm import SamplingParams

    content = [
        {"type": "image_pil", "image_pil": load_picture(image)},
        {"type": "text", "text": question},
    ]
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    answer = llm.chat([{"role": "user", "content": content}], params)[0].outputs[0]
    print(answer.text)
    if answer.spec_decode_metrics is not None:
        metrics = answer.spec_decode_metrics.to_dict()
        print(f"acceptance_length: {metrics['mean_acceptance_length']:.2f}")


if __name__ == "__main__":
    typer.run(main)

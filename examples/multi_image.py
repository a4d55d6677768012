"""Several images in one prompt: `python -m examples.multi_image`.

Every image gets its own compact tokens and global feature. The tiny VLM has seen one image per
prompt only, so give a larger model for sensible answers; the outputs are lossless either way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from examples.pair import DraftOption, DraftTokensOption, ModelOption, Pair, start_llm
from examples.pictures import held_out_pictures, load_picture
from examples.tiny_vlm.shipped import DRAFT_TOKENS, HEAD, TARGET


def main(
    model: ModelOption = TARGET,
    draft_model: DraftOption = HEAD,
    num_speculative_tokens: DraftTokensOption = DRAFT_TOKENS,
    image: Annotated[list[Path] | None, typer.Option(help="Repeat for several images.")] = None,
    question: Annotated[str, typer.Option()] = "Describe the picture.",
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Ask one question about several images."""
    pair = Pair(model, draft_model, num_speculative_tokens)
    pictures = [load_picture(file) for file in image or ()] or held_out_pictures("captioning", 2)
    llm = start_llm(pair, limit_mm_per_prompt={"image": len(pictures)})
    from vllm import SamplingParams

    content: list[dict[str, Any]] = [
        {"type": "image_pil", "image_pil": picture} for picture in pictures
    ]
    content.append({"type": "text", "text": question})
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    print(llm.chat([{"role": "user", "content": content}], params)[0].outputs[0].text)


if __name__ == "__main__":
    typer.run(main)

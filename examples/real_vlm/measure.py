"""Measure the target: `python -m examples.real_vlm.measure`.

The share of image facts that its greedy answers state, with the image and with a blank one of the
same size, in vLLM; and perplexity on text, beside SmolLM2's own.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from examples.tiny_vlm.samples import image_part, with_images
from vllm_vispec.utils.files import write_json

from .build import TARGET
from .own import prompt
from .samples import HELD_OUT, KINDS, Own, Sample, make_sample, stated

TEXT = Path(__file__).parents[2] / "docs"


def facts_right(llm: Any, samples: list[Sample], blank: bool) -> tuple[dict[str, float], list[str]]:
    """Share of facts by kind and over all, and the answers; `blank`: the images show nothing."""
    from vllm import SamplingParams

    def part(image: Image.Image) -> dict[str, Any]:
        return image_part(Image.new("RGB", image.size, (225, 225, 225)) if blank else image)

    asked = [
        with_images(one.messages(len(one.turns) - 1), (part(shown.image) for shown in one.images))
        for one in samples
    ]
    found = llm.chat(asked, SamplingParams(temperature=0, max_tokens=400), use_tqdm=True)
    answers = [one.outputs[0].text for one in found]
    right, total = Counter[str](), Counter[str]()
    for sample, answer in zip(samples, answers, strict=True):
        facts = sample.turns[-1].facts
        for name in (sample.kind, "all"):
            right[name] += stated(facts, answer)
            total[name] += len(facts)
    return {name: round(right[name] / total[name], 4) for name in total}, answers


def perplexity(folder: Path, texts: list[tuple[str, str]]) -> float:
    """Perplexity of the second half of each text after its first, in fp32."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loss, count = 0.0, 0
    for given, wanted in texts:
        start = tokenizer.encode(given, add_special_tokens=False)
        rest = tokenizer.encode(wanted, add_special_tokens=False)[:512]
        ids = torch.tensor([start + rest])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(start) - 1 : -1]
        loss += float(
            torch.nn.functional.cross_entropy(logits, ids[0, len(start) :], reduction="sum")
        )
        count += len(rest)
    return math.exp(loss / count)


def texts(own: Own, count: int) -> dict[str, list[tuple[str, str]]]:
    """Held-out chats of SmolLM2 with itself, and prose: the pages of this repository."""
    chats = [
        (prompt(q), f"{a}{'<|im_end|>' if whole else ''}") for q, a, whole in own.chats[:count]
    ]
    prose = [("<|endoftext|>", file.read_text()) for file in sorted(TEXT.glob("*.md"))[:count]]
    return {name: pairs for name, pairs in {"chats": chats, "prose": prose}.items() if pairs}


def main(
    target: Annotated[Path, typer.Option(help="Folder of the target.")] = TARGET,
    base: Annotated[
        Path | None, typer.Option(help="Folder that `build --adapter none` wrote.")
    ] = None,
    own: Annotated[Path, typer.Option(help="Folder that `own` wrote.")] = Path("out/real_vlm/own"),
    count: Annotated[int, typer.Option(help="Samples a kind.")] = 24,
    output: Annotated[Path, typer.Option(help="JSON to write.")] = Path(
        "out/real_vlm/measured.json"
    ),
) -> None:
    """Measure facts and, where `base` is given, perplexity."""
    from vllm import LLM

    texts_of = Own.read(own, held_out=True)
    kinds = [kind for kind in KINDS if kind != "chat" and (texts_of.stories or kind != "story")]
    samples = [make_sample(HELD_OUT + i, texts_of, kind) for kind in kinds for i in range(count)]
    llm = LLM(
        model=str(target),
        max_model_len=3072,
        enforce_eager=not torch.cuda.is_available(),
        max_num_seqs=32,
        limit_mm_per_prompt={"image": 2},
    )
    with_image, answers = facts_right(llm, samples, blank=False)
    blank, _ = facts_right(llm, samples, blank=True)
    result: dict[str, Any] = {"samples_per_kind": count, "facts": with_image, "facts_blank": blank}
    if base is not None:
        result["perplexity"] = {
            name: {"target": perplexity(target, pairs), "smollm2": perplexity(base, pairs)}
            for name, pairs in texts(texts_of, 60).items()
        }
    shown = [
        {
            "kind": s.kind,
            "question": s.turns[-1].question,
            "answer": x,
            "reference": s.turns[-1].answer,
        }
        for s, x in zip(samples, answers, strict=True)
    ]
    write_json(output, result)
    write_json(output.with_name(f"{output.stem}-answers.json"), shown)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)

"""Train tower, merger and LoRA: `python -m examples.real_vlm.train`. Resumable: repeat the command.

Two stages, each on images that it has never seen: the tower names what cells show (`vision`),
then tower, merger and LoRA learn to answer, next-token loss on the answers and nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from vllm_vispec.utils.files import write_tensors

from .build import SYSTEM, add_lora, trained_state
from .samples import Own, Sample, make_sample
from .state import Run
from .vision import train_vision

POOL = 12  # batches that are drawn together and cut by length


@dataclass(frozen=True)
class Encoded:
    """Token ids [T] of a dialogue and which of them belong to answers [T]."""

    sample: Sample
    ids: list[int]
    answer: list[bool]


def encode(sample: Sample, tokenizer: Any) -> Encoded:
    """The dialogue as the chat template writes it, each image with its tokens."""
    shown = "".join(
        f"<|vision_start|>{'<|image_pad|>' * one.tokens}<|vision_end|>" for one in sample.images
    )
    parts = [(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n", False)]
    for i, turn in enumerate(sample.turns):
        question = f"{shown if i == 0 else ''}{turn.question}"
        parts.append((f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False))
        parts += [(f"{turn.answer}{'<|im_end|>' if turn.whole else ''}", True), ("\n", False)]
    ids: list[int] = []
    answer: list[bool] = []
    for text, wanted in parts:
        new = tokenizer.encode(text, add_special_tokens=False)
        ids += new
        answer += [wanted] * len(new)
    return Encoded(sample, ids, answer)


def batches(tokenizer: Any, own: Own, seed: int, tokens: int) -> Iterator[list[Encoded]]:
    """Endless batches of about `tokens` tokens, padding included; no sample comes twice."""
    while True:
        drawn: list[Encoded] = []
        while sum(len(one.ids) for one in drawn) < tokens * POOL:
            one = encode(make_sample(seed, own), tokenizer)
            seed += 1
            if len(one.ids) <= 1600:
                drawn.append(one)
        drawn.sort(key=lambda one: len(one.ids))
        groups: list[list[Encoded]] = [[]]
        for one in drawn:
            if groups[-1] and len(one.ids) * (len(groups[-1]) + 1) > tokens:
                groups.append([])
            groups[-1].append(one)
        Random(seed).shuffle(groups)
        yield from groups


def answer_loss(model: Any, processor: Any, batch: list[Encoded]) -> tuple[Tensor, Tensor]:
    """Next-token loss of every answer token and the row of each; shapes [A]."""
    core = model.model
    length = max(len(one.ids) for one in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    present, answer = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, one in enumerate(batch):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        answer[row, : len(one.ids)] = torch.tensor(one.answer)
        present[row, : len(one.ids)] = 1
    shown = ids == core.config.image_token_id
    x = core.language_model.embed_tokens(ids)
    pictures = [canvas.image for one in batch for canvas in one.sample.images]
    grids = None
    if pictures:
        inputs = processor(images=pictures, return_tensors="pt")
        grids = inputs["image_grid_thw"]
        visual = core.visual(inputs["pixel_values"], grid_thw=grids).pooler_output
        x = x.masked_scatter(shown[..., None], visual.to(x.dtype))
    positions, _ = core.get_rope_index(
        ids, mm_token_type_ids=shown.int(), image_grid_thw=grids, attention_mask=present
    )
    # Padding stands on the right, where causal attention never looks: no mask is needed.
    hidden = core.language_model(
        inputs_embeds=x, position_ids=positions, use_cache=False
    ).last_hidden_state
    wanted = answer[:, 1:]
    logits = model.lm_head(hidden[:, :-1][wanted]).float()
    rows = torch.arange(len(batch))[:, None].expand_as(wanted)[wanted]
    return F.cross_entropy(logits, ids[:, 1:][wanted], reduction="none"), rows


def train_language(
    model: Any, processor: Any, tokenizer: Any, own: Own, work: Path, minutes: float
) -> Run:
    """Train everything that is committed; the language model's own weights stay."""
    from peft.helpers import disable_input_dtype_casting

    model.model.language_model.bfloat16()
    peft = add_lora(model)
    for name, value in peft.named_parameters():
        value.requires_grad_(".visual." in name or ".lora_" in name)
    trained = {name: value for name, value in peft.named_parameters() if value.requires_grad}
    tower = [value for name, value in trained.items() if ".visual." in name]
    lora = [value for name, value in trained.items() if ".lora_" in name]
    optimizer = torch.optim.AdamW(
        [{"params": tower, "lr": 3e-4}, {"params": lora, "lr": 8e-4}], betas=(0.9, 0.98)
    )
    run = Run(work / "language.safetensors", trained, optimizer, 60 * minutes)
    recent: dict[str, list[float]] = defaultdict(list)
    for batch in batches(tokenizer, own, run.step * 1000, 2400):
        if run.done:
            break
        with torch.autocast("cpu", torch.bfloat16), disable_input_dtype_casting(peft):
            each, rows = answer_loss(peft.base_model.model, processor, batch)
        each.mean().backward()
        norm = run.update()
        for row, one in enumerate(batch):
            recent[one.sample.kind].append(float(each.detach()[rows == row].mean()))
        if run.step % 20 == 0:
            shown = {kind: sum(values) / len(values) for kind, values in sorted(recent.items())}
            run.log.append({"step": run.step, "norm": norm, **shown})
            text = " ".join(f"{kind} {value:.2f}" for kind, value in shown.items())
            print(f"language {run.step}: {run.seconds / 60:.1f} min, {text}", flush=True)
            recent.clear()
        if run.save_sometimes():
            write_adapter(peft, work / "adapter")
    run.save()
    write_adapter(peft, work / "adapter")
    return run


def write_adapter(peft: Any, folder: Path) -> None:
    """Write tower, merger and LoRA in bf16, for `build --adapter`."""
    state = {name: value.detach().bfloat16() for name, value in trained_state(peft).items()}
    write_tensors(folder / "adapter.safetensors", state)


def main(
    base: Annotated[Path, typer.Option(help="Folder that `build --adapter none` wrote.")],
    work: Annotated[Path, typer.Option(help="Checkpoints; the adapter in the end.")],
    own: Annotated[Path, typer.Option(help="Folder that `own` wrote.")],
    vision_minutes: Annotated[float, typer.Option(help="Processor minutes of stage 1.")] = 45,
    language_minutes: Annotated[float, typer.Option(help="Processor minutes of stage 2.")] = 190,
    stage: Annotated[Literal["vision", "all"], typer.Option(help="Stop after stage 1?")] = "all",
) -> None:
    """Train, or go on."""
    from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    torch.set_num_threads(1)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    train_vision(model, processor, tokenizer, work, vision_minutes)
    if stage == "vision":
        return
    train_language(model, processor, tokenizer, Own.read(own), work, language_minutes)
    print(work / "adapter")


if __name__ == "__main__":
    typer.run(main)

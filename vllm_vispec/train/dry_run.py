"""`vispec train --dry-run`: what a run will cost, before it costs anything.

Tensor names end in their shape: V vocabulary, D hidden.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from vllm_vispec.data.encode import Encoded, Measured, too_long
from vllm_vispec.data.image_bounds import bounds_in
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import Rejected
from vllm_vispec.reference import Draft
from vllm_vispec.train.cache import bytes_of
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.data import BatchOrder, Corpus, Samples, count_reasons
from vllm_vispec.train.distributed import Processes
from vllm_vispec.train.loop import Run
from vllm_vispec.train.preflight import checkpoint_bytes, prepare, skeleton, starting_draft
from vllm_vispec.train.teacher import cache_folder, target_dtype
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import nearest

LOOK_AT = 256
"""Samples whose tokens are counted; the rest is taken to be like them."""
WARM_STEPS, TIMED_STEPS = 3, 20
GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """Bytes in a process's memory at the worst moment of a step, estimated.

    Attributes:
        target: what stays of the frozen target.
        draft: float32 weights and gradients, AdamW's moments, the average, copies in bfloat16.
        step: what the forward pass keeps for the backward pass.
    """

    target: int
    draft: int
    step: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.target + self.draft + self.step


def dry_run(config: TrainConfig, group: Processes, timed: bool) -> str:
    """Check a recipe and return what it will cost, as lines for the user.

    Args:
        timed: also load the target and take a few steps, in a folder that is deleted.

    Raises:
        ViSpecError: the run would not work.
    """
    asked = config
    config, corpus = prepare(config, group.world)
    draft, model = starting_draft(config), skeleton(config.target.model)
    dtype = target_dtype(config, group)
    counts, rejected, answers = _look(config, corpus, dtype)
    share = len(counts) / max(len(counts) + len(rejected), 1)
    number = round(len(corpus.train) * share)
    order = BatchOrder(tuple(range(number)), {}, config.batch, group.world, config.run.seed)
    steps = config.schedule.total_steps(order.steps_per_epoch)
    longest = max(one.tokens for one in counts)
    target = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    resident = target
    if config.teacher.mode == "offline":  # its embedding table and lm_head
        tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        resident = sum(one.numel() for one in tables) * dtype.itemsize
    cost = memory(config, draft, resident, longest, answers)
    lines = [
        ("target", f"{config.target.model}, {target / GIB:.3g} GiB as {dtype}"),
        ("head", _head(config, draft)),
        ("images", _images(config)),
        ("samples", _samples(corpus, number, rejected, len(counts) + len(rejected))),
        ("tokens", _tokens(counts, number)),
        ("steps", _steps(config, order, steps, group)),
        ("memory", _memory(config, cost, target, _room(group))),
        ("disk", _disk(config, draft, counts, number + len(corpus.validation), dtype)),
    ]
    if timed:
        lines.append(("time", _time(asked, group, steps, order.step_samples)))
    return "\n".join(f"{name:<8} {text}" for name, text in lines)


def memory(config: TrainConfig, draft: Draft, target: int, tokens: int, answers: int) -> Cost:
    """Estimate a process's peak memory in bytes.

    Per draft weight 18 bytes (22 with an average), per token what one decoder layer keeps in
    bfloat16, per logit 16 bytes in at most `loss.chunk_rows` rows at once, per later pass the
    attention of the answer's rows over all tokens in float32, twice. Within a fifth of what
    FakeTensor counted for seven cases of Qwen2.5-VL-7B.

    Args:
        target: bytes of the target's weights that stay.
        tokens, answers: of the longest sample.
    """
    head, loss, samples = draft.config, config.loss, config.batch
    batch = samples.size
    if samples.max_tokens:
        batch = max(min(samples.size * samples.accumulate, samples.max_tokens // tokens), 1)
    weights = sum(p.numel() for p in draft.parameters())
    passes = draft.distinct_passes(loss.passes)
    rows = batch * answers
    logits = (loss.chunk_rows if rows > loss.chunk_rows else passes * rows) * head.vocab_size * 16
    layer = (34 * head.hidden_size + 12 * head.intermediate_size) * head.num_hidden_layers
    later = (passes - 1) * rows
    attention = later * tokens * head.num_attention_heads * 8
    step = logits + (batch * tokens + later) * layer + attention
    return Cost(target, weights * (22 if config.optimizer.ema else 18), step)


def _room(group: Processes) -> int | None:
    """Bytes of the device; None: a CPU."""
    if group.device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(group.device).total_memory


def _memory(config: TrainConfig, cost: Cost, target: int, room: int | None) -> str:
    text = (
        f"{cost.total / GIB:.3g} GiB a process at its peak, estimated: target "
        f"{cost.target / GIB:.3g}, draft {cost.draft / GIB:.3g}, step {cost.step / GIB:.3g}"
    )
    if config.teacher.mode == "offline":
        text += f"; before that {target / GIB:.3g} for the target alone, which stores its states"
    if config.teacher.engine == "vllm":
        text, target = f"{text} in vLLM, over the GPUs of teacher.engine_options", 0
    if room is not None and max(cost.total, target) > room:
        text += (
            f". The GPU has {room / GIB:.3g} GiB: lower batch.size, loss.passes or data.max_length"
        )
    return text


def _look(
    config: TrainConfig, corpus: Corpus, dtype: torch.dtype
) -> tuple[list[Measured], list[Rejected], int]:
    """Count the tokens of some samples; also the answer's tokens of the longest."""
    processor = load_processor(config.target.model, bounds_in(vars(config.data)))
    samples, every = Samples(corpus, processor, dtype), corpus.train
    counts: dict[int, Measured] = {}
    rejected = []
    for index in every[:: max(1, len(every) // LOOK_AT)]:
        found = samples.measure(index)
        if isinstance(found, Measured) and found.tokens > config.data.max_length:
            found = Rejected(str(index), too_long(found, config.data.max_length))
        if isinstance(found, Rejected):
            rejected.append(found)
        else:
            counts[index] = found
    if not counts:
        first = f" (first reason: {rejected[0].reason})" if rejected else ""
        raise ViSpecError(
            f"none of {len(rejected)} samples of data.train is usable{first}: correct the files, "
            "data.image_root or data.max_length"
        )
    encoded = samples.encode(max(counts, key=lambda index: counts[index].tokens))
    answers = int(encoded.answer.sum()) if isinstance(encoded, Encoded) else 0
    return list(counts.values()), rejected, answers


def _images(config: TrainConfig) -> str:
    bounds = " to ".join(map(str, bounds_in(vars(config.data)).values()))
    return f"{bounds} pixels" if bounds else "fixed size"


def _head(config: TrainConfig, draft: Draft) -> str:
    weights = sum(p.numel() for p in draft.parameters()) / 1e6
    start = f"from {config.head.init_from}" if config.head.init_from else "fresh"
    return f"{config.head.kind}, {weights:,.4g} million weights, {start}; loss {config.loss.name}"


def _samples(corpus: Corpus, number: int, rejected: list[Rejected], looked: int) -> str:
    reasons = count_reasons(rejected).items()
    of_those = ", ".join(f"{name} {entry['count']}" for name, entry in reasons)
    return (
        f"about {number:,} to train on, {len(corpus.validation)} held out; {len(corpus.rejected)} "
        f"unreadable, of {looked} looked at {len(rejected)} left out"
        + (f" ({of_those})" if of_those else "")
    )


def _tokens(counts: list[Measured], number: int) -> str:
    mean, longest = fmean(one.tokens for one in counts), max(one.tokens for one in counts)
    return f"{mean:,.0f} a sample, {longest:,} the longest; about {mean * number:,.0f} an epoch"


def _steps(config: TrainConfig, order: BatchOrder, steps: int | None, group: Processes) -> str:
    batch, limit = config.batch, config.schedule.minutes
    ends = [f"{steps:,} in all"] * (steps is not None) + [f"{limit:g} minutes at most"] * bool(
        limit
    )
    return (
        f"{order.steps_per_epoch:,} an epoch of {order.step_samples} samples (batch.size "
        f"{batch.size} x batch.accumulate {batch.accumulate} x {group.world} processes), "
        + ", ".join(ends)
    )


def _disk(
    config: TrainConfig, draft: Draft, counts: list[Measured], number: int, dtype: torch.dtype
) -> str:
    output = Path(config.run.output).absolute()
    text = f"{checkpoint_bytes(config, draft) / 1e9:.3g} GB of checkpoints in {output}"
    if config.teacher.mode == "offline":
        states = bytes_of(config, counts, dtype) / len(counts) * number
        text += f", about {states / 1e9:.3g} GB of states in {cache_folder(config)}"
    return f"{text}; {shutil.disk_usage(nearest(output)).free / 1e9:,.3g} GB free"


def _time(config: TrainConfig, group: Processes, steps: int | None, step_samples: int) -> str:
    """Take a few steps of the recipe on samples drawn from its data; return their time."""
    output = Path(config.run.output).absolute()
    # One for all processes.
    folder = nearest(output.parent) / f".{output.name}-dry-run"
    samples = step_samples * (WARM_STEPS + TIMED_STEPS)
    changes = {
        "data": {"max_samples": samples, "validation": (), "validation_share": 0.0},
        "teacher": {"cache_dir": str(folder / "cache")},
        "run": {"output": str(folder), "trackers": ()},
    }
    shorter = config.model_copy(
        update={
            name: getattr(config, name).model_copy(update=values)
            for name, values in changes.items()
        }
    )
    try:
        run = Run(*prepare(shorter, group.world), group, (), "dry run")
        try:
            seconds = run.time(WARM_STEPS, TIMED_STEPS)
        finally:
            run.log.close()
        group.wait()
    finally:
        if group.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    text = f"{seconds:.3g} s a step ({TIMED_STEPS} steps timed)"
    if steps is not None:
        before = "storing states, " if config.teacher.mode == "offline" else ""
        text += f", {seconds * steps / 3600:.3g} hours in all without {before}start and validation"
    if group.device.type == "cuda":
        text += f"; peak memory {torch.cuda.max_memory_allocated() / GIB:.3g} GiB"
    return text

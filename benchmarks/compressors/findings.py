"""Everything that is known about a head besides the engine's answers: replay, gates, costs.

Replaying greedy chains over the target's greedy answers gives what the engine accepts, in float32
exactly, at a fraction of its time: so these numbers are over more questions than the engine's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.answers import GROUPS, IMAGES, make_rows, only, read_all
from benchmarks.calls import Call, Measured, acceptance_length, estimate, ratio
from benchmarks.compressors import VARIANTS
from benchmarks.study import HELD_OUT, NUM_DRAFT_TOKENS, Study, Trained
from benchmarks.turns import read_measured
from vllm_vispec.compressors.places import num_tokens, place_tokens
from vllm_vispec.compressors.spec import CompressorSpec
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.folder import inspect_head, load_draft
from vllm_vispec.reference import tensor_shapes
from vllm_vispec.utils.files import read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_vispec.compressors.compressor import ImageCompressor
    from vllm_vispec.reference import ViSpecDraft
    from vllm_vispec.train.target import Observed, TrainingTarget

MAX_LENGTH, BATCH_SIZE = 1024, 8
IMAGE_TOKENS = (64, 256, 1024)
REPLAYED, GATES = "replayed", "choices"


def look_at_held_out(study: Study) -> None:
    """Replay the held-out answers with the first seed's heads, and ask their gates.

    What is done is kept.

    Raises:
        ViSpecError: the target, a head or the data cannot be used.
    """
    missing = [
        one
        for one in study.heads(study.seeds[:1])
        if study.head(one).is_dir() and not study.result(REPLAYED, one).is_file()
    ]
    if not missing:
        return
    model, observed = observe(study.target, study.questions(HELD_OUT) / "answers.jsonl")
    states = list(question_states(observed))
    for trained in missing:
        draft = load_draft(study.head(trained)).eval()
        if draft.config.has_compressor and draft.config.compressor_spec.gated:
            assert draft.compressor is not None
            found = choose_by_family(draft.compressor.float(), states)
            write_json(study.result(GATES, trained), found)
        replayed = Measured(tuple(replay_all(draft, model, observed)))
        write_json(study.result(REPLAYED, trained), replayed.to_json())
        print(f"replayed: {trained.name}", flush=True)


def observe(target: str, data: Path) -> tuple[TrainingTarget, list[Observed]]:
    """The target in float32 on the CPU, and what it computes for the conversations of a file."""
    import torch

    from vllm_vispec.data.encode import Encoder
    from vllm_vispec.data.template import load_processor
    from vllm_vispec.evaluate.options import read_samples
    from vllm_vispec.train.target import TrainingTarget

    model = TrainingTarget.load(target, torch.float32, "cpu")
    encoder = Encoder(load_processor(target), MAX_LENGTH, data.parent)
    samples = read_samples(data, encoder, [])
    found: list[Observed] = []
    while group := list(islice(samples, BATCH_SIZE)):
        found += model.observe([sample.encoded for sample in group])
    return model, found


def replay_all(
    draft: ViSpecDraft, target: TrainingTarget, observed: Sequence[Observed]
) -> Iterator[Call]:
    """Accepted drafts of greedy chains over the answers of conversations, a call for each."""
    import torch

    from vllm_vispec.train.acceptance import answer_spans, draft_hits, replay
    from vllm_vispec.train.target import pad_batch

    for start in range(0, len(observed), BATCH_SIZE):
        group = observed[start : start + BATCH_SIZE]
        with torch.inference_mode():
            hits_SBL = draft_hits(draft, target.lm_head_VD, pad_batch(group), NUM_DRAFT_TOKENS)
        for number, one in enumerate(group):
            hits = hits_SBL[:, number].tolist()
            spans = answer_spans(one.answer.tolist())
            accepted = [count for begin, end in spans for count in replay(hits, begin, end)]
            yield Call((one.family,), (tuple(accepted),))


def question_states(observed: Iterable[Observed]) -> Iterator[tuple[str, Tensor]]:
    """Family and target state [D] at the end of the prompt, of every answer behind an image."""
    from vllm_vispec.train.acceptance import answer_spans

    for one in observed:
        first_image = min((start for start, _ in one.runs), default=len(one.token_ids))
        for start, _ in answer_spans(one.answer.tolist()):
            if first_image < start:
                yield one.family, one.hidden_LD[start - 1]


def choose_by_family(
    compressor: ImageCompressor, asked: Sequence[tuple[str, Tensor]]
) -> list[dict[str, Any]]:
    """Decisions of a gate by family: how often a branch has the largest share, mean shares."""
    import torch

    branches = [str(one) for one in compressor.spec.primitives]
    found = []
    for family in dict.fromkeys(family for family, _ in asked):
        states_GD = torch.stack([state for name, state in asked if name == family])
        with torch.inference_mode():
            output = compressor.decide(states_GD)
        counts = torch.bincount(output.choice_G, minlength=len(branches)).tolist()
        shares = output.share_GK.mean(0).tolist()
        found.append({"family": family, "branches": branches, "counts": counts, "shares": shares})
    return found


def image_cost(config: HeadConfig, image_tokens: int) -> dict[str, Any]:
    """What one image costs a head, from its configuration alone.

    Returns:
        ``kv_tokens``: rows with keys and values that queries can see. ``seen``: of these, fewest
        and most that a request sees; they differ where a gate selects. ``megaflops``: to make its
        tokens, and their inputs, keys and values in the layer.
    """
    kept = kept_rows(config, image_tokens)
    selects = config.has_compressor and config.compressor_spec.name == "select"
    seen = kept if selects else [sum(kept)]
    width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
    # A token goes through half of fc; an image token that stays a text row through all of it.
    inputs = 2 * width * width * (1 if config.compress else 2)
    flops = sum(kept) * (inputs + 4 * width * kv_width)
    made_by = list(config.compressor_spec.primitives) if config.has_compressor else []
    if config.has_adaptor:
        made_by.append(CompressorSpec("resampler", config.num_query_tokens))
    flops += sum(primitive_flops(branch, width, image_tokens) for branch in made_by)
    return {
        "image_tokens": image_tokens,
        "kv_tokens": sum(kept),
        "seen": [min(seen), max(seen)],
        "megaflops": flops / 1e6,
    }


def kept_rows(config: HeadConfig, image_tokens: int) -> list[int]:
    """Rows of one image that are not masked, branch by branch."""
    if not config.compress:
        return [image_tokens]
    if config.rows_per_image is not None:
        return [min(config.rows_per_image, image_tokens)]
    spec = config.compressor_spec
    branches = place_tokens(spec, image_tokens).branches.tolist()
    return [branches.count(number) for number in range(len(spec.primitives))]


def primitive_flops(spec: CompressorSpec, width: int, size: int) -> int:
    """Floating point operations of a primitive for an image of `size` embeddings; 0 for copying."""
    if spec.name == "pool":
        return size * width
    if spec.name == "conv":
        return 2 * num_tokens(spec, size) * spec.amount * width**2
    if spec.name == "resampler":
        # Keys and values, scores and sums, and the output projection.
        attended = 4 * size * width**2 + 4 * spec.amount * size * width
        return attended + 2 * spec.amount * width**2
    return 0


def count_image_parameters(config: HeadConfig) -> int:
    """Weights of a head that only images need."""
    of_images = ("compressor.", "img_adaptor.", "img_fc.")
    shapes = tensor_shapes(config).items()
    return sum(prod(shape) for name, shape in shapes if name.startswith(of_images))


def read_findings(study: Study) -> list[dict[str, Any]]:
    """Rows of the JSON: all heads of the first seed that were measured in some way."""
    known = {(row["variant"], row["epochs"]): row for row in make_rows(study, read_all(study))}
    findings = [
        _finding(study, trained, known.get((trained.variant.name, trained.epochs)))
        for trained in study.heads(study.seeds[:1])
        if study.head(trained).is_dir()
    ]
    return [one for one in findings if one["engine"] or one["replayed"]]


def _finding(study: Study, trained: Trained, row: Mapping[str, Any] | None) -> dict[str, Any]:
    config = inspect_head(study.head(trained)).config
    variant = trained.variant
    mine, other = _replayed(study, trained), None
    if variant.after:
        other = _replayed(study, replace(trained, variant=VARIANTS[variant.after]))
    gates = study.result(GATES, trained)
    return {
        "name": trained.name,
        "label": variant.label,
        "settings": variant.settings,
        "epochs": trained.epochs,
        "engine": row,
        "replayed": estimate(mine, acceptance_length) if mine else None,
        "replayed_ratio": ratio(mine, other, acceptance_length) if mine and other else None,
        "parameters_for_images": count_image_parameters(config),
        "image_cost": [image_cost(config, size) for size in IMAGE_TOKENS],
        "choices": read_json(gates) if gates.is_file() else [],
    }


def _replayed(study: Study, trained: Trained) -> list[list[Call]] | None:
    """Of the image tasks, one seed; None if it was not computed."""
    file = study.result(REPLAYED, trained)
    return only([read_measured(file).calls], GROUPS[IMAGES]) if file.is_file() else None

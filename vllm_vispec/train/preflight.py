"""What is checked of a run before anything is encoded or loaded.

Everything that can be wrong is looked at in the order of its cost: settings, then configurations
and headers, then the data files.
"""

from __future__ import annotations

import re
import shutil
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_vispec.data.image_bounds import bounds_in, recorded_bounds, same_bounds, set_bounds
from vllm_vispec.data.tables import is_table, write_out
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import ANSWER_TOKENS_KEY
from vllm_vispec.heads.target import load_target_config
from vllm_vispec.reference import Draft
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.data import Corpus, read_corpus
from vllm_vispec.train.head_types import get_head_type, resolve
from vllm_vispec.train.init import as_asked, make_draft
from vllm_vispec.train.published import PublishedModel, find_start
from vllm_vispec.train.target import TargetFacts, check_structure, image_token_id
from vllm_vispec.train.trackers import check_trackers
from vllm_vispec.utils.errors import ViSpecError, first_line
from vllm_vispec.utils.files import nearest

BYTES_PER_WEIGHT = 12
"""Of a draft weight in a checkpoint: float32 and the two moments of AdamW."""


def prepare(config: TrainConfig, world: int) -> tuple[TrainConfig, Corpus]:
    """Check a recipe; return it with all that its data and processes decide, and the data.

    Args:
        world: number of processes.

    Raises:
        ViSpecError: settings, head, target, files or disk do not allow the run.
    """
    config = with_batch(resolve(config.require_complete()), world)
    check_trackers(config.run.trackers)
    _check_attention(config.target.attention)
    check_disk(config, starting_draft(config))
    text_only = get_head_type(config.head.kind).text_only
    corpus = read_corpus(config.data, text_only)
    if not corpus.entries:
        first = "".join(f" (first: {x.sample_id}: {x.reason})" for x in corpus.rejected[:1])
        raise ViSpecError(
            f"none of {len(corpus.rejected)} records of data.train can be used{first}: correct the "
            "files or data.image_root"
        )
    if not corpus.train:
        raise ViSpecError(
            f"data.train has no sample to train on, {len(corpus.validation)} are held out: "
            + (
                f"head.kind {config.head.kind} trains on samples without images, add some"
                if text_only
                else "lower data.validation_share"
            )
        )
    _check_tokens(corpus, config.target.model)
    where = "the run's data (data.train, data.validation)"
    asked = bounds_in(vars(config.data))
    conversations = (entry.conversation for entry in corpus.entries)
    wanted = same_bounds(asked, recorded_bounds(conversations, where, asked), where)
    bounds = set_bounds(load_processor(config.target.model), wanted)
    data = config.data.model_copy(update=bounds)
    return config.model_copy(update={"data": data}), corpus


def _check_attention(name: str) -> None:
    """Refuse attention that is not installed.

    Raises:
        ViSpecError: names the package.
    """
    from transformers.utils import is_flash_attn_2_available

    if name == "flash_attention_2" and not is_flash_attn_2_available():
        raise ViSpecError(
            "target.attention flash_attention_2 needs the package flash-attn and a GPU: install "
            "it, or leave the setting at sdpa"
        )


def _check_tokens(corpus: Corpus, target: str) -> None:
    """Refuse answers whose recorded tokens the target does not have."""
    vocab_size = load_target_config(target).get_text_config().vocab_size
    for entry in corpus.entries:
        answers = entry.conversation.extra.get(ANSWER_TOKENS_KEY)
        for tokens in answers if isinstance(answers, list) else ():
            # What is no list of tokens is rejected with its sample.
            if isinstance(tokens, array) and tokens and max(tokens) >= vocab_size:
                raise ViSpecError(
                    f"data.train: sample {entry.conversation.sample_id} has token {max(tokens)}, "
                    f"target.model {target!r} has {vocab_size}: the answers are another model's; "
                    "make them with `vispec regenerate --target`"
                )


def with_batch(config: TrainConfig, world: int) -> TrainConfig:
    """Return the recipe with as many forward passes per step as `batch.global_size` needs.

    Raises:
        ViSpecError: the processes cannot share it evenly.
    """
    batch = config.batch
    if not batch.global_size:
        return config
    together = batch.size * world
    passes, rest = divmod(batch.global_size, together)
    if rest or not passes:
        raise ViSpecError(
            f"batch.global_size {batch.global_size} is no multiple of batch.size {batch.size} x "
            f"{world} processes: set batch.global_size to {together * max(passes, 1)} (and scale "
            "optimizer.lr with it), lower batch.size, or start fewer processes"
        )
    if batch.accumulate not in (1, passes):
        raise ViSpecError(
            f"batch.accumulate {batch.accumulate} contradicts batch.global_size "
            f"{batch.global_size}, which needs {passes}: leave batch.accumulate out"
        )
    return config.model_copy(update={"batch": batch.model_copy(update={"accumulate": passes})})


def skeleton(name: str, setting: str = "target.model") -> Any:
    """Return a vision-language model without its weights, on the meta device.

    Args:
        name: folder or hub id.
        setting: what the user calls it, for messages.

    Raises:
        ViSpecError: it is none that training knows, or its folder holds no weights.
    """
    from transformers import AutoModelForImageTextToText

    found = load_target_config(name, setting)
    image_token_id(found)
    if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")):
        raise ViSpecError(
            f"{setting} {name!r} holds no *.safetensors: give the folder of a complete model"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(found)
    except (ValueError, RuntimeError) as error:
        raise ViSpecError(
            f"{setting} {name!r} cannot be built ({first_line(error)}): give a vision-language "
            "model that transformers knows"
        ) from error
    check_structure(model, f"{setting} {name!r}")
    return model


def starting_draft(config: TrainConfig) -> Draft:
    """Return what the run would start from, but the target's tables are zeros.

    A published model, which may be large, has no weights.

    Raises:
        ViSpecError: the target cannot be used, or `head.init_from` does not fit target or recipe.
    """
    head, model = config.head, skeleton(config.target.model)
    is_path = head.init_from.count("/") != 1 or head.init_from.startswith((".", "/", "~"))
    if head.init_from and is_path and not Path(head.init_from).expanduser().exists():
        raise ViSpecError(
            f"head.init_from {head.init_from!r} does not exist: train that head first, or start "
            "fresh with examples/recipes/vision.yaml (head.init_from empty, optimizer.lr 3e-5)"
        )
    published = find_start(config)
    if published is not None:
        folder = published.folder
        draft = PublishedModel(folder, skeleton(str(folder), "head.init_from"), published.config)
        return as_asked(draft, head)
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    # One number that looks like a whole table.
    embed_VD, lm_head_VD = (torch.zeros(()).expand(one.shape) for one in tables)
    text = model.config.get_text_config()
    facts = TargetFacts(str(model.config.model_type), text, embed_VD, lm_head_VD)
    return make_draft(head, facts, config.run.seed)


def checkpoint_bytes(config: TrainConfig, draft: Draft) -> int:
    """Return the size of the checkpoints that a run keeps, one being written included."""
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    each = trained * (BYTES_PER_WEIGHT + (4 if config.optimizer.ema else 0))
    return each * (config.run.keep + 2)


def check_disk(config: TrainConfig, draft: Draft) -> None:
    """Refuse a disk without room for the checkpoints; the offline teacher checks its cache itself.

    Raises:
        ViSpecError: it has none, or run.output cannot be a folder.
    """
    output = Path(config.run.output).absolute()
    place = nearest(output)
    if not place.is_dir():
        raise ViSpecError(f"run.output {output}: {place} is a file; choose another folder")
    needed, free = checkpoint_bytes(config, draft), shutil.disk_usage(place).free
    if needed > free:
        raise ViSpecError(
            f"run.output {output} needs {needed / 1e9:.3g} GB for checkpoints, {free / 1e9:.3g} GB "
            "are free: free space, lower run.keep, or choose another disk"
        )


def without_tables(config: TrainConfig) -> TrainConfig:
    """Return the recipe with a conversation file for each table; writes those that are missing.

    Raises:
        ViSpecError: a table cannot be read, or settings do not go together: they come first.
    """
    resolve(config)
    check_trackers(config.run.trackers)
    folder = Path(config.run.output) / "tables"

    def files(names: Sequence[str]) -> tuple[str, ...]:
        places = [folder / re.sub(r"[^\w.-]+", "_", name) for name in names]
        return tuple(
            str(write_out(name, place)) if is_table(name) else name
            for name, place in zip(names, places, strict=True)
        )

    found = {"train": files(config.data.train), "validation": files(config.data.validation)}
    return config.model_copy(update={"data": config.data.model_copy(update=found)})

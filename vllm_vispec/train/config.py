"""The recipe of a training run: every setting, its default, its meaning and its source.

`vispec train --explain` prints them. Sources: "ViSpec" = the paper (arXiv 2509.15235), "ViSpec
code" = its published training scripts, "NeMo" = the independent recipe in NVIDIA NeMo AutoModel,
"SpecVLM" = arXiv 2509.11815 section 3.5, "ours" = chosen here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import Settings, choices, iter_fields, parse

Dtype = Literal["float32", "bfloat16", "float16"]

_SHORT = (
    "With --set and --override the section may be left out of a name that no other section has: "
    "--set compressor=select"
)


def setting(default: Any, source: str, **limits: Any) -> Any:
    """A field with the source of its default; `ge` and `le` are its limits.

    What it means is the text below it.
    """
    return Field(default, json_schema_extra={"source": source}, **limits)


class Section(Settings):
    """A section of the recipe."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _from_yaml(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML 1.1 reads `off` and `on` as booleans and nothing as None; one text is a list."""
        kind = cls.model_fields[str(info.field_name)].annotation
        is_list, is_number = get_origin(kind) is tuple, kind in (int, float)
        if isinstance(value, bool):
            return str(value) if is_number else "on" if value else "off"
        if value is None and not is_number:
            return () if is_list else "" if kind is str else {}
        return (value,) if is_list and isinstance(value, str) else value


class TargetConfig(Section):
    """The frozen model whose answers are to be predicted."""

    model: str = setting("", "required")
    """folder or hub id of the target"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "ViSpec code (bfloat16)"
    )
    """how the target computes; auto: bfloat16 on a GPU, float32 on a CPU"""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = setting("sdpa", "transformers")
    """attention of the target in transformers; with sdpa, windows of its vision tower are one
    call"""


class HeadSettings(Section):
    """The draft to train."""

    kind: str = setting("vispec", "ViSpec")
    """head type: see vllm_vispec.train.head_types"""
    compressor: str = setting("", "SpecVLM (select)")
    """what makes an image's tokens, like prune:20 or select: see vllm_vispec.compressors.spec;
    none: that of the head type"""
    num_query_tokens: int = setting(2, "ViSpec code", ge=1)
    """learned queries of ViSpec's adaptor; one less is the number of rows per image"""
    input_norm: Literal["auto", "on", "off"] = setting("auto", "SpecVLM (on), ViSpec code (off)")
    """norm of the draft's input; auto: as the head type, or as head.init_from"""
    init_from: str = setting("", "ours; MASSV")
    """head folder to start from; for a draft VLM also a small language model, or a published VLM,
    which stays one"""
    num_layers: int = setting(0, "ours", ge=0)
    """decoder layers of a draft VLM; 0: those of head.init_from, else 4"""
    hidden_size: int = setting(0, "ours", ge=0)
    """width of a draft VLM; 0: that of head.init_from, else the target's"""
    num_heads: int = setting(0, "ours", ge=0)
    """heads of a draft VLM; 0: those of head.init_from, else as wide as the target's"""
    trained: Literal["all", "language_model", "projector"] = setting(
        "all", "MASSV (stage 1: projector)"
    )
    """which weights of a draft VLM are trained; projector: stage 1; language_model: all but what
    reads images"""
    dtype: Dtype = setting("bfloat16", "ViSpec code")
    """dtype of the exported weights"""


class DataConfig(Section):
    """What to train and validate on."""

    train: tuple[str, ...] = setting((), "required")
    """JSONL files of conversations"""
    validation: tuple[str, ...] = setting((), "ours")
    """JSONL files held out; none: a share of train"""
    validation_share: float = setting(0.05, "ViSpec code (95/5)", ge=0, le=0.9)
    """share of train that is held out"""
    validation_max: int = setting(256, "ours", ge=1)
    """at most this many held-out samples"""
    image_root: str = setting("", "ours")
    """folder that image paths start from; none: the file's"""
    max_length: int = setting(4096, "ViSpec code, NeMo", ge=4)
    """longer samples are left out and counted"""
    min_pixels: int = setting(0, "ViSpec code (256 tokens)", ge=0)
    """smaller images are enlarged to this; 0: as the answers were made, else by the target"""
    max_pixels: int = setting(0, "ViSpec code (1280 tokens)", ge=0)
    """larger images are reduced to this; 0: as the answers were made, else by the target"""
    max_samples: int = setting(0, "ours", ge=0)
    """use so many of train, drawn at random; 0: all"""
    memory_mb: int = setting(1024, "ours", ge=0)
    """samples kept in memory once they are ready, MiB; the rest is made ready again"""
    workers: int = setting(4, "NeMo", ge=0)
    """processes per process of the run that make samples ready ahead; 0: none"""


class LossSettings(Section):
    """What is minimised."""

    name: str = setting("auto", "SpecVLM; MASSV; ViSpec code, NeMo")
    """a loss of vllm_vispec.train.losses; auto: specvlm with a compressor, kl for a draft VLM, else
    vispec"""
    weights: dict[str, float] = setting({}, "see losses")
    """weights of its terms; none: its own"""
    passes: int = setting(2, "ViSpec code (1 extra pass)", ge=1)
    """rollout passes, the first on the target's states; a draft VLM always has one"""
    mode: Literal["exact", "shifted"] = setting("exact", "EAGLE-3 (training-time test)")
    """what a row of a later pass sees; exact: as in the engine, shifted: as in the reference"""
    pass_decay: float = setting(1.0, "ViSpec code (equal)", ge=0)
    """weight of pass s is this to the power of s"""
    noise: float = setting(0.0, "SpecVLM (online: off)", ge=0)
    """uniform noise on the target's states; ViSpec: 0.2"""
    chunk_rows: int = setting(512, "ours", ge=1)
    """rows whose logits are in memory at a time"""
    balance: float = setting(0.01, "ours", ge=0)
    """weight of the load balance over the branches of select"""
    temperature_start: float = setting(1.0, "ours", ge=0.01)
    """of the Gumbel softmax of select at the run's start"""
    temperature_end: float = setting(0.5, "ours", ge=0.01)
    """at its end, linear between; as progress goes for the rate"""

    def temperature(self, progress: float) -> float:
        """Temperature of the Gumbel softmax after this share of the run."""
        return self.temperature_start + (self.temperature_end - self.temperature_start) * progress


class OptimizerConfig(Section):
    """AdamW and what happens to its gradients."""

    lr: float = setting(3e-5, "NeMo (stage 1)", ge=0)
    """peak learning rate"""
    beta1: float = setting(0.9, "ViSpec, SpecVLM", ge=0, le=1)
    """AdamW"""
    beta2: float = setting(0.95, "ViSpec, SpecVLM", ge=0, le=1)
    """AdamW"""
    eps: float = setting(1e-8, "PyTorch", ge=0)
    """AdamW"""
    weight_decay: float = setting(0.0, "SpecVLM", ge=0)
    """AdamW"""
    clip: Literal["value", "norm", "none"] = setting("value", "ViSpec code")
    """how gradients are clipped"""
    clip_at: float = setting(0.5, "ViSpec code", ge=0)
    """largest value or norm"""
    ema: float = setting(0.0, "ours", ge=0, le=0.99999)
    """decay of a moving average of the weights, which is exported; 0: off"""


class ScheduleConfig(Section):
    """How long, and the learning rate on the way. The first limit that is reached ends it."""

    epochs: float = setting(20.0, "ViSpec", ge=0)
    """passes over the data; 0: no limit"""
    max_steps: int = setting(0, "ours", ge=0)
    """optimizer steps; 0: no limit"""
    minutes: float = setting(0.0, "ours", ge=0)
    """minutes of training; 0: no limit"""
    warmup: float = setting(0.05, "ViSpec (1 of 20), NeMo", ge=0, le=1)
    """share of the run in which the rate rises from 0"""
    decay: Literal["linear", "cosine", "constant"] = setting("linear", "ViSpec code")
    """shape of the rate's fall"""
    floor: float = setting(0.1, "NeMo", ge=0, le=1)
    """last rate, as a share of the peak"""

    def total_steps(self, steps_per_epoch: int) -> int | None:
        """Return the steps after which a run ends, None without such a limit."""
        limits = [self.max_steps] if self.max_steps else []
        if self.epochs:
            limits.append(max(1, round(self.epochs * steps_per_epoch)))
        return min(limits, default=None)


class BatchConfig(Section):
    """How samples are put together."""

    size: int = setting(8, "ViSpec (global batch)", ge=1)
    """samples per process and forward pass"""
    accumulate: int = setting(1, "NeMo: 8 of size 1", ge=1)
    """forward passes per step"""
    global_size: int = setting(0, "NeMo, ViSpec (8)", ge=0)
    """samples per step over all processes, which decides batch.accumulate; 0: size x accumulate x
    processes"""
    max_tokens: int = setting(0, "speculators (packed)", ge=0)
    """tokens of a forward pass, padding included: a step's samples, size x accumulate of each
    process, are put together up to this instead of by size; 0: by size"""
    pool: int = setting(16, "ours", ge=1)
    """batches that are sorted by length together, against padding"""


class TeacherConfig(Section):
    """Where hidden states come from."""

    mode: Literal["online", "offline"] = setting(
        "online", "SpecVLM (online), ViSpec code (offline)"
    )
    """online: the target runs in every step; offline: its states are read from disk"""
    cache_dir: str = setting("", "ours")
    """folder that runs share, of the target's states and of samples' lengths; none: cache beside
    run.output"""
    shard_samples: int = setting(64, "ours", ge=1)
    """samples per cache file"""
    engine: Literal["transformers", "vllm"] = setting("transformers", "ours")
    """what computes the states that offline stores; vllm: for a target that one device does not
    hold, or a quantised one"""
    engine_options: dict[str, Any] = setting({}, "ours")
    """arguments of vllm.LLM, like {tensor_parallel_size: 8}"""


class RunConfig(Section):
    """Where results go, and how often."""

    output: str = setting("", "required")
    """folder of checkpoints, curves and the head"""
    seed: int = setting(0, "ViSpec code", ge=0)
    """of weights, order and noise"""
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "ours")
    """auto: a GPU if there is one"""
    autocast: Literal["auto", "off", "bfloat16"] = setting("auto", "ViSpec code")
    """mixed precision of the draft; auto: bfloat16 on a GPU"""
    shard: Literal["auto", "on", "off"] = setting("auto", "ours")
    """whether processes share weights and moments (FSDP2) or each has all (DDP); auto: from a
    billion trained weights on"""
    compile: Literal["on", "off"] = setting("off", "ours")
    """whether TorchInductor makes kernels of the draft's layer and of the loss; for GPUs"""
    threads: int = setting(0, "ours", ge=0)
    """CPU threads of PyTorch; 0: its own choice"""
    validate_every: int = setting(500, "ours", ge=0)
    """steps between validations; 0: at the end only"""
    save_every: int = setting(500, "ours", ge=0)
    """steps between checkpoints; 0: at the end only"""
    keep: int = setting(2, "ours", ge=1)
    """newest checkpoints kept, beside the best"""
    log_every: int = setting(10, "ours", ge=1)
    """steps per line of metrics.jsonl"""
    trackers: tuple[str, ...] = setting((), "ours")
    """where metrics go, too: trackio, wandb, tensorboard"""
    project: str = setting("vispec", "ours")
    """what trackers list the run under"""
    show_drafts: int = setting(2, "ours", ge=0)
    """held-out answers that are shown with their draft tokens at each validation"""
    num_draft_tokens: int = setting(5, "ours", ge=1, le=32)
    """K of the simulated acceptance_length, and of the head as it is served"""
    export: Literal["best", "last"] = setting("best", "ours")
    """which weights become the head"""


class TrainConfig(Settings):
    """A whole recipe."""

    target: TargetConfig = TargetConfig()
    head: HeadSettings = HeadSettings()
    data: DataConfig = DataConfig()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch: BatchConfig = BatchConfig()
    teacher: TeacherConfig = TeacherConfig()
    run: RunConfig = RunConfig()

    @field_validator("*", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        return {} if value is None else value

    def require_complete(self) -> TrainConfig:
        """Check what a run cannot do without; returns itself.

        Raises:
            ViSpecError: a required setting is missing or nothing ends the run.
        """
        flat = self.flat()
        for name in ("target.model", "data.train", "run.output"):
            if not flat[name]:
                raise ViSpecError(
                    f"{name} is not set: write it in the recipe or add --set {name}=…"
                )
        if not (self.schedule.epochs or self.schedule.max_steps or self.schedule.minutes):
            raise ViSpecError(
                "nothing ends the training: set schedule.epochs, schedule.max_steps or "
                "schedule.minutes"
            )
        return self

    def flat(self) -> dict[str, Any]:
        """Plain data under dotted names, e.g. "optimizer.lr"."""
        return {
            f"{section}.{name}": value
            for section, values in self.model_dump(mode="json").items()
            for name, value in values.items()
        }


def load_config(recipe: str | Path | None, assignments: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe and apply assignments on top.

    Args:
        recipe: a YAML file with the sections of `TrainConfig`; None = defaults only.
        assignments: "section.name=value", the value as YAML; see `full_name`.

    Raises:
        ViSpecError: the file cannot be read, or a key or value is wrong; an unknown key is
            reported with the nearest known one.
    """
    content = {} if recipe is None else _read(Path(recipe))
    for text in assignments:
        name, value = _assignment(text)
        _assign(content, full_name(name), value)
    return _parse(content)


def config_from_flat(flat: Mapping[str, Any]) -> TrainConfig:
    """A config from dotted names, e.g. {"optimizer.lr": 3e-5}.

    Raises:
        ViSpecError: a key is unknown or a value of the wrong type.
    """
    content: dict[str, Any] = {}
    for name, value in flat.items():
        _assign(content, name, value)
    return _parse(content)


def full_name(name: str) -> str:
    """A setting's dotted name; its section may be left out where no other has such a setting.

    Raises:
        ViSpecError: several sections have one; names them.
    """
    found = [full for full, _ in iter_fields(TrainConfig) if full.partition(".")[2] == name]
    if len(found) > 1:
        raise ViSpecError(
            f"setting {name!r} is in several sections: write {' or '.join(found)} in full"
        )
    return found[0] if found else name


def explain() -> str:
    """A text table of every setting: name, default, meaning, source of the default."""
    rows = []
    for name, field in iter_fields(TrainConfig):
        default, extra = field.default, field.json_schema_extra
        is_number = isinstance(default, (int, float))
        shown = f"{default:g}" if is_number else str(default or "-")
        meaning = " ".join(str(field.description).split()) + (
            f" ({' | '.join(c)})" if (c := choices(field)) else ""
        )
        assert isinstance(extra, dict)
        rows.append((name, shown, meaning, extra["source"]))
    widths = [max(len(str(row[column])) for row in rows) for column in range(2)]
    lines = [
        f"{name:<{widths[0]}}  {default:<{widths[1]}}  {meaning}  [{source}]"
        for name, default, meaning, source in rows
    ]
    return "\n".join((*lines, "", _SHORT))


def _parse(content: Mapping[str, Any]) -> TrainConfig:
    return parse(TrainConfig, content, see="`vispec train --explain`")


def _read(recipe: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ViSpecError(f"recipe {recipe} cannot be read ({error}): give a YAML file") from error
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ViSpecError(f"recipe {recipe} is no YAML ({line}): correct it") from error
    if not isinstance(content or {}, dict):
        raise ViSpecError(f"recipe {recipe} holds no sections: see examples/recipes")
    return content or {}


def _assignment(text: str) -> tuple[str, Any]:
    import yaml

    name, separator, value = text.partition("=")
    if not separator:
        raise ViSpecError(f"--set {text!r} has no '=': write --set section.name=value")
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ViSpecError(f"--set {text!r}: the value is no YAML, quote it") from error


def _assign(content: dict[str, Any], name: str, value: Any) -> None:
    """Set a dotted name in nested data; `loss.weights.kl` changes one entry of a mapping."""
    section, _, rest = name.partition(".")
    if not rest:
        content[section] = value
        return
    below = content.get(section)
    content[section] = dict(below) if isinstance(below, Mapping) else {}
    _assign(content[section], rest, value)

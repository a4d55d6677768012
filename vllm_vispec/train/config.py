"""Everything a training run can be told: one frozen dataclass per section of the recipe.

Every setting carries its meaning and where its default comes from; `vispec train --explain` prints
them. Sources: "ViSpec" = the paper (arXiv 2509.15235), "ViSpec code" = its published training
scripts, "NeMo" = the independent recipe in NVIDIA NeMo AutoModel, "SpecVLM" = arXiv 2509.11815
section 3.5, "ours" = chosen here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vllm_vispec.train.section import Section, setting
from vllm_vispec.utils.errors import ViSpecError


@dataclass(frozen=True)
class TargetConfig(Section):
    """The frozen model whose answers are to be predicted."""

    model: str = setting("", "folder or hub id of the target", "required")
    dtype: str = setting(
        "auto",
        "how the target computes; auto: bfloat16 on a GPU, float32 on a CPU",
        "ViSpec code (bfloat16)",
        choices=("auto", "float32", "bfloat16", "float16"),
    )


@dataclass(frozen=True)
class HeadSettings(Section):
    """The draft to train."""

    kind: str = setting("vispec", "which head: see vllm_vispec.train.kinds", "ViSpec")
    compressor: str = setting(
        "",
        "what makes an image's tokens, like prune:20 or select: see vllm_vispec.compressors.spec; "
        "none: the kind's own",
        "SpecVLM (select)",
    )
    num_query_tokens: int = setting(
        2,
        "learned queries of ViSpec's adaptor; one less is the number of rows per image",
        "ViSpec code",
        low=1,
    )
    input_norm: str = setting(
        "auto",
        "norm of the draft's input; auto: as the kind, or as head.init_from",
        "SpecVLM (on), ViSpec code (off)",
        choices=("auto", "on", "off"),
    )
    init_from: str = setting(
        "",
        "head folder to start from; for a draft VLM also a small language model's",
        "ours; MASSV",
    )
    num_layers: int = setting(
        0, "decoder layers of a draft VLM; 0: those of head.init_from, else 4", "ours", low=0
    )
    hidden_size: int = setting(
        0, "width of a draft VLM; 0: that of head.init_from, else the target's", "ours", low=0
    )
    num_heads: int = setting(
        0, "heads of a draft VLM; 0: those of head.init_from, else as wide as the target's", "ours",
        low=0,
    )  # fmt: skip
    trained: str = setting(
        "all",
        "which weights of a draft VLM are trained; projector: stage 1",
        "MASSV (stage 1: projector)",
        choices=("all", "projector"),
    )
    dtype: str = setting(
        "bfloat16",
        "dtype of the exported weights",
        "ViSpec code",
        choices=("float32", "bfloat16", "float16"),
    )


@dataclass(frozen=True)
class DataConfig(Section):
    """What to train and validate on."""

    train: tuple[str, ...] = setting((), "JSONL files of conversations", "required")
    validation: tuple[str, ...] = setting(
        (), "JSONL files held out; none: a share of train", "ours"
    )
    validation_share: float = setting(
        0.05, "share of train that is held out", "ViSpec code (95/5)", low=0.0, high=0.9
    )
    validation_max: int = setting(256, "at most this many held-out samples", "ours", low=1)
    image_root: str = setting("", "folder that image paths start from; none: the file's", "ours")
    max_length: int = setting(
        4096, "longer samples are left out and counted", "ViSpec code, NeMo", low=4
    )
    max_samples: int = setting(0, "use the first so many of train; 0: all", "ours", low=0)
    memory_mb: int = setting(
        1024, "encoded samples kept in memory, MiB; the rest is encoded again", "ours", low=0
    )


@dataclass(frozen=True)
class LossSettings(Section):
    """What is minimised."""

    name: str = setting(
        "auto",
        "a loss of vllm_vispec.train.losses; auto: specvlm with a compressor, kl for a draft VLM, "
        "else vispec",
        "SpecVLM; MASSV; ViSpec code, NeMo",
    )
    weights: Mapping[str, float] = setting({}, "weights of its parts; none: its own", "see losses")
    passes: int = setting(
        2,
        "rollout passes, the first on the target's states; a draft VLM always has one",
        "ViSpec code (1 extra pass)",
        low=1,
    )
    mode: str = setting(
        "exact",
        "what a row of a later pass sees; exact: as in the engine, shifted: as in the reference",
        "EAGLE-3 (training-time test)",
        choices=("exact", "shifted"),
    )
    pass_decay: float = setting(
        1.0, "weight of pass s is this to the power of s", "ViSpec code (equal)", low=0.0
    )
    noise: float = setting(
        0.0, "uniform noise on the target's states; ViSpec: 0.2", "SpecVLM (online: off)", low=0.0
    )
    chunk_rows: int = setting(2048, "rows whose logits are in memory at a time", "ours", low=1)
    balance: float = setting(
        0.01, "weight of the load balance over the branches of select", "ours", low=0.0
    )
    temperature_start: float = setting(
        1.0, "of the Gumbel softmax of select at the run's start", "ours", low=0.01
    )
    temperature_end: float = setting(
        0.5, "at its end, linear between; as progress goes for the rate", "ours", low=0.01
    )

    def temperature(self, progress: float) -> float:
        """Of the Gumbel softmax when a share of the run is over."""
        return self.temperature_start + (self.temperature_end - self.temperature_start) * progress


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW and what happens to its gradients."""

    lr: float = setting(3e-5, "peak learning rate", "NeMo (stage 1)", low=0.0)
    beta1: float = setting(0.9, "AdamW", "ViSpec, SpecVLM", low=0.0, high=1.0)
    beta2: float = setting(0.95, "AdamW", "ViSpec, SpecVLM", low=0.0, high=1.0)
    eps: float = setting(1e-8, "AdamW", "PyTorch", low=0.0)
    weight_decay: float = setting(0.0, "AdamW", "SpecVLM", low=0.0)
    clip: str = setting(
        "value",
        "how gradients are clipped",
        "ViSpec code",
        choices=("value", "norm", "none"),
    )
    clip_at: float = setting(0.5, "largest value or norm", "ViSpec code", low=0.0)
    ema: float = setting(
        0.0, "decay of a moving average of the weights, which is exported; 0: off", "ours",
        low=0.0, high=0.99999,
    )  # fmt: skip


@dataclass(frozen=True)
class ScheduleConfig(Section):
    """How long, and the learning rate on the way. The first limit that is reached ends it."""

    epochs: float = setting(20.0, "passes over the data; 0: no limit", "ViSpec", low=0.0)
    max_steps: int = setting(0, "optimizer steps; 0: no limit", "ours", low=0)
    minutes: float = setting(0.0, "minutes of training; 0: no limit", "ours", low=0.0)
    warmup: float = setting(
        0.05, "share of the run in which the rate rises from 0", "ViSpec (1 of 20), NeMo",
        low=0.0, high=1.0,
    )  # fmt: skip
    decay: str = setting(
        "linear",
        "shape of the rate's fall",
        "ViSpec code",
        choices=("linear", "cosine", "constant"),
    )
    floor: float = setting(0.1, "last rate, as a share of the peak", "NeMo", low=0.0, high=1.0)


@dataclass(frozen=True)
class BatchConfig(Section):
    """How samples are put together."""

    size: int = setting(8, "samples per process and forward pass", "ViSpec (global batch)", low=1)
    accumulate: int = setting(1, "forward passes per step", "NeMo: 8 of size 1", low=1)
    pool: int = setting(
        16, "batches that are sorted by length together, against padding", "ours", low=1
    )


@dataclass(frozen=True)
class TeacherConfig(Section):
    """Where hidden states come from."""

    mode: str = setting(
        "online",
        "online: the target runs in every step; offline: its states are read from disk",
        "SpecVLM (online), ViSpec code (offline)",
        choices=("online", "offline"),
    )
    cache_dir: str = setting("", "folder of the cache; none: <run.output>/cache", "ours")
    shard_samples: int = setting(64, "samples per cache file", "ours", low=1)


@dataclass(frozen=True)
class RunConfig(Section):
    """Where results go, and how often."""

    output: str = setting("", "folder of checkpoints, curves and the head", "required")
    seed: int = setting(0, "of weights, order and noise", "ViSpec code", low=0)
    device: str = setting(
        "auto", "auto: a GPU if there is one", "ours", choices=("auto", "cpu", "cuda")
    )
    autocast: str = setting(
        "auto", "mixed precision of the draft; auto: bfloat16 on a GPU", "ViSpec code",
        choices=("auto", "off", "bfloat16"),
    )  # fmt: skip
    threads: int = setting(0, "CPU threads of PyTorch; 0: its own choice", "ours", low=0)
    validate_every: int = setting(
        500, "steps between validations; 0: at the end only", "ours", low=0
    )
    save_every: int = setting(500, "steps between checkpoints; 0: at the end only", "ours", low=0)
    keep: int = setting(2, "newest checkpoints kept, beside the best", "ours", low=1)
    log_every: int = setting(10, "steps per line of metrics.jsonl", "ours", low=1)
    num_draft_tokens: int = setting(5, "K of the simulated tokens_per_round", "ours", low=1)
    export: str = setting("best", "which weights become the head", "ours", choices=("best", "last"))


@dataclass(frozen=True)
class TrainConfig:
    """A whole recipe.

    Raises:
        ViSpecError: a required setting is missing or nothing ends the run.
    """

    target: TargetConfig = field(default_factory=TargetConfig)
    head: HeadSettings = field(default_factory=HeadSettings)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossSettings = field(default_factory=LossSettings)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def require_complete(self) -> TrainConfig:
        """Check what a run cannot do without; returns itself."""
        required = {
            "target.model": self.target.model,
            "data.train": self.data.train,
            "run.output": self.run.output,
        }
        for name, value in required.items():
            if not value:
                raise ViSpecError(
                    f"{name} is not set: write it in the recipe or add --set {name}=…"
                )
        if not (self.schedule.epochs or self.schedule.max_steps or self.schedule.minutes):
            raise ViSpecError(
                "nothing ends the training: set schedule.epochs, schedule.max_steps or "
                "schedule.minutes"
            )
        return self

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Plain data, section by section."""
        plain: dict[str, dict[str, Any]] = {}
        for item in fields(self):
            section = getattr(self, item.name)
            values = {f.name: getattr(section, f.name) for f in fields(section)}
            plain[item.name] = {name: _plain(value) for name, value in values.items()}
        return plain

    def flat(self) -> dict[str, Any]:
        """Plain data under dotted names, e.g. "optimizer.lr"."""
        return {
            f"{section}.{name}": value
            for section, values in self.as_dict().items()
            for name, value in values.items()
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value

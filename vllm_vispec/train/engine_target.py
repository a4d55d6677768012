"""A target that vLLM runs, for the offline cache: spread over devices, quantised, of any size.

vLLM returns the states after the final norm of every token, as its pooling task `token_embed`
does. What a draft reads beside them is small: the embedding table, lm_head and the vision tower.
transformers loads these alone, as a model without decoder layers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_vispec.data.encode import Encoded
from vllm_vispec.data.image_bounds import bounds_in
from vllm_vispec.data.images import open_image
from vllm_vispec.heads.target import load_target_config
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.distributed import Processes
from vllm_vispec.train.target import (
    Observed,
    TrainingTarget,
    embedding_table,
    image_token_id,
    load_model,
)
from vllm_vispec.utils.engine_start import starting_engine
from vllm_vispec.utils.errors import ViSpecError

ENGINE_BATCH = 16
"""Samples that vLLM gets at once: enough to keep it full, few enough to hold their pixels."""
# Beside it the tower and the tables lie on the same device.
_MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class EngineTarget(TrainingTarget):
    """A target whose decoder layers run in vLLM; `model` has none.

    Attributes:
        llm: the `vllm.LLM`.
    """

    llm: Any

    @classmethod
    def start(cls, config: TrainConfig, dtype: torch.dtype, group: Processes) -> EngineTarget:
        """Load what drafts read, then start vLLM with `teacher.engine_options`.

        Raises:
            ViSpecError: the target cannot be read, its vision tower or lm_head is quantised, or
                the engine does not start.
        """
        name = config.target.model
        shallow = load_target_config(name)
        text = shallow.get_text_config()
        text.num_hidden_layers = 0
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = []
        if getattr(text, "hidden_size_per_layer_input", None):
            text.hidden_size_per_layer_input = 0  # Gemma 4 adds it between layers
        shallow.quantization_config = None
        model = load_model(name, dtype, shallow=shallow)
        model.requires_grad_(False)
        model.eval().to(group.device)
        return cls(
            model_type=str(shallow.model_type),
            text_config=load_target_config(name).get_text_config(),
            embed_VD=embedding_table(model),
            lm_head_VD=model.get_output_embeddings().weight,
            model=model,
            folder=name,
            image_token_id=image_token_id(shallow),
            llm=_start(config, dtype),
        )

    def stop(self) -> None:
        """End the engine and free its memory."""
        self.llm.llm_engine.engine_core.shutdown()

    def observe(self, samples: Sequence[Encoded]) -> list[Observed]:
        """Run the target on samples.

        Raises:
            ViSpecError: vLLM expands a sample's images to other tokens, or memory ran out.
        """
        prompts = [_prompt(sample) for sample in samples]
        outputs = self.llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        found = []
        for sample, output in zip(samples, outputs, strict=True):
            if list(output.prompt_token_ids) != sample.token_ids.tolist():
                raise ViSpecError(
                    f"vLLM makes {len(output.prompt_token_ids)} tokens of sample "
                    f"{sample.sample_id}, its processor {len(sample.token_ids)}: leave "
                    "mm_processor_kwargs out of teacher.engine_options, or set teacher.engine to "
                    "transformers"
                )
            (observed,) = super().observe([sample])  # its states have met no decoder layer
            hidden_LD = output.outputs.data.to(observed.embeds_LD)
            found.append(replace(observed, hidden_LD=hidden_LD))
        return found


def _prompt(sample: Encoded) -> dict[str, Any]:
    """A sample as vLLM takes it: one token for each image."""
    kept_L = torch.ones(len(sample.token_ids), dtype=torch.bool)
    for start, end in sample.runs:
        kept_L[start + 1 : end] = False
    prompt: dict[str, Any] = {"prompt_token_ids": sample.token_ids[kept_L].tolist()}
    images = [open_image(str(file), None) for file in sample.images]
    return prompt | ({"multi_modal_data": {"image": images}} if images else {})


def _start(config: TrainConfig, dtype: torch.dtype) -> Any:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM
    from vllm.config import PoolerConfig

    longest = getattr(
        load_target_config(config.target.model).get_text_config(),
        "max_position_embeddings",
        config.data.max_length,
    )
    options: dict[str, Any] = {
        "model": config.target.model,
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": min(config.data.max_length, longest),
        "gpu_memory_utilization": _MEMORY_SHARE,
        "mm_processor_kwargs": bounds_in(vars(config.data)) or None,
        **config.teacher.engine_options,
        # States of all tokens, as they are.
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": PoolerConfig(task="token_embed", pooling_type="ALL", use_activation=False),
        "enable_prefix_caching": False,
    }

    def spell(name: str, value: str) -> str:
        return f"--set 'teacher.engine_options={{{name}: {value}}}'"

    with starting_engine(config.target.model, spell):
        return LLM(**options)

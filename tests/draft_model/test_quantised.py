"""What a quantised draft leaves as it is, named as published."""

from __future__ import annotations

from functools import partial

import pytest
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)

from vllm_vispec.compat.patching import patch
from vllm_vispec.draft_model.model import _with_published_name

EIGHT = {"num_bits": 8, "type": "int", "symmetric": True}


@pytest.mark.parametrize(
    ("name", "is_quantised"),
    [
        ("visual.blocks.0.attn.qkv", False),
        ("visual.merger.mlp.0", False),
        ("language_model.model.layers.0.mlp.down_proj", True),
    ],
)
def test_layers_are_listed_without_our_prefix(name: str, is_quantised: bool) -> None:
    group = {
        "targets": ["Linear"],
        "weights": {**EIGHT, "strategy": "channel", "dynamic": False},
        "input_activations": {**EIGHT, "strategy": "token", "dynamic": True},
    }
    config = CompressedTensorsConfig.from_config(
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["re:visual.blocks.*", "visual.merger.mlp.0"],
        }
    )
    patch(config, "get_quant_method", partial(_with_published_name, "draft_model."))
    layer = LinearBase.__new__(LinearBase)
    nn.Module.__init__(layer)
    found = config.get_quant_method(layer, prefix=f"draft_model.{name}")
    assert isinstance(found, UnquantizedLinearMethod) != is_quantised

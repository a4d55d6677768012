"""A quantised model folder, in the format that compressed-tensors publishes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def quantise(whole: Path, folder: Path) -> Path:
    """Write a model with matrices of its language model in int8, a scale for each row."""
    shutil.copytree(whole, folder)
    tensors = {}
    for name, tensor in load_file(whole / "model.safetensors").items():
        if name.endswith("_proj.weight") and "visual" not in name:
            scale = tensor.abs().amax(dim=1, keepdim=True) / 127
            tensors[name] = (tensor / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["re:visual.*", "re:.*lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder

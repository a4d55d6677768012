"""Write the trained target as a standard Hugging Face Qwen2.5-VL folder (bf16)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .model import EPS, Target, TargetConfig
from .tokenizer import load_tokenizer, save_processor

MAX_POSITIONS = 4096
_VISION_NAMES: dict[str, str] = {
    "visual.patch.": "visual.patch_embed.proj.",
    "visual.ln_q.": "visual.merger.ln_q.",
    "visual.merge.": "visual.merger.mlp.",
}


def hf_name(name: str) -> str:
    """Our parameter name -> checkpoint name."""
    for ours, theirs in _VISION_NAMES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name if name.startswith(("visual.", "lm_head.")) else f"model.{name}"


def hf_state(target: Target) -> dict[str, Tensor]:
    """Weights in bf16 under their checkpoint names."""
    out = {}
    for name, value in target.state_dict().items():
        if name == "visual.patch.weight":
            # The processor repeats a still image in both temporal frames.
            frame = value.view(-1, 3, 1, 14, 14) / 2
            value = torch.cat([frame, frame], dim=2)
        out[hf_name(name)] = value.to(torch.bfloat16).contiguous()
    return out


def _vision_config(c: TargetConfig) -> dict:
    return {
        "model_type": "qwen2_5_vl",
        "depth": c.vision_depth,
        "hidden_size": c.vision_hidden,
        "num_heads": c.vision_heads,
        "intermediate_size": c.vision_mlp,
        "hidden_act": "silu",
        "in_chans": 3,
        "in_channels": 3,
        "out_hidden_size": c.hidden,
        "patch_size": 14,
        "spatial_patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": c.vision_window or 112,
        "fullatt_block_indexes": [] if c.vision_window else list(range(c.vision_depth)),
    }


def hf_config(c: TargetConfig, ids: dict[str, int]) -> dict:
    """config.json in the style of the published Qwen2.5-VL checkpoints."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": c.hidden,
        "initializer_range": 0.02,
        "intermediate_size": c.mlp,
        "max_position_embeddings": MAX_POSITIONS,
        "max_window_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "num_key_value_heads": c.kv_heads,
        "rms_norm_eps": EPS,
        "rope_theta": c.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(c.mrope_section)},
        "sliding_window": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": c.vocab_size,
        "vision_config": _vision_config(c),
    }


def export(target: Target, processor: Path, folder: Path) -> None:
    """Write weights, configs, tokenizer and processor."""
    tokenizer = load_tokenizer(processor)
    save_processor(tokenizer, folder)
    ids = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    save_file(hf_state(target), folder / "model.safetensors", metadata={"format": "pt"})
    generation = {
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "do_sample": False,
    }
    (folder / "config.json").write_text(json.dumps(hf_config(target.c, ids), indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def load_target(folder: Path) -> Target:
    """Read an exported folder back into the lean model (bf16, evaluation mode)."""
    raw = json.loads((folder / "config.json").read_text())
    vision = raw["vision_config"]
    config = TargetConfig(
        vocab_size=raw["vocab_size"],
        hidden=raw["hidden_size"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        mlp=raw["intermediate_size"],
        layers=raw["num_hidden_layers"],
        rope_theta=raw["rope_theta"],
        mrope_section=tuple(raw["rope_scaling"]["mrope_section"]),
        vision_depth=vision["depth"],
        vision_hidden=vision["hidden_size"],
        vision_heads=vision["num_heads"],
        vision_mlp=vision["intermediate_size"],
        vision_window=0 if vision["fullatt_block_indexes"] else vision["window_size"],
    )
    target = Target(config)
    stored = load_file(folder / "model.safetensors")
    state = {name: stored[hf_name(name)] for name in target.state_dict()}
    patch = state["visual.patch.weight"]
    state["visual.patch.weight"] = patch.sum(dim=2).reshape(patch.shape[0], -1)
    target.load_state_dict(state)
    return target.bfloat16().eval()


def main() -> None:
    """Export the last checkpoint of a stage."""
    from .train_target import load_run

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("out/tiny_vlm"))
    parser.add_argument("--stage", default="deep")
    default = Path(__file__).parent / "checkpoints" / "target"
    parser.add_argument("--output", type=Path, default=default)
    args = parser.parse_args()
    run = load_run(args.work_dir / f"{args.stage}.pt")
    export(run.target, args.work_dir / "processor", args.output)
    print(f"{args.output}: stage {run.stage}, step {run.step}")


if __name__ == "__main__":
    main()

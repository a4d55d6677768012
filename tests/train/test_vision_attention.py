"""The vision tower attends to all windows at once, and computes what it did one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vllm_vispec.train.vision_attention import use_window_attention

# Published depth and windows of Qwen2.5-VL-7B; patches of each image.
IMAGES = {"even": [(64, 80)], "one window is short": [(24, 36)], "two images": [(24, 36), (16, 16)]}


@pytest.mark.parametrize("sizes", IMAGES.values(), ids=IMAGES)
def test_one_call_per_layer(sizes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel as Tower,
    )

    config = Qwen2_5_VLVisionConfig(
        depth=32, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32,
        fullatt_block_indexes=[7, 15, 23, 31], window_size=112,
    )  # fmt: skip
    torch.manual_seed(0)
    tower = Tower._from_config(config, attn_implementation="sdpa").eval()
    grid = torch.tensor([[1, height, width] for height, width in sizes])
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14)
    calls, attend = [], F.scaled_dot_product_attention

    def counted(*args: object, **options: object) -> torch.Tensor:
        calls.append(1)
        return attend(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    with torch.no_grad():
        before = tower(pixels, grid_thw=grid).pooler_output
        assert len(calls) > 300
        calls.clear()
        use_window_attention(tower)
        after = tower(pixels, grid_thw=grid).pooler_output
    assert len(calls) == config.depth
    torch.testing.assert_close(after, before, atol=2e-5, rtol=1e-4)

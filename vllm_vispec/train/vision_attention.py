"""The vision tower's attention in one call per layer instead of one per window.

Qwen's vision towers (and those built like them) attend within windows and within images. With
transformers' "sdpa" every layer waits for the windows' lengths and calls attention window by
window: 2,244 calls for one image of 1,280 tokens in Qwen2.5-VL-7B, so the host is the limit. With
an implementation whose name contains "flash", transformers hands all windows over at once.

Tensor names end in their shape: N patches, W windows, M patches of the longest window, H heads, K
head_dim.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "vispec_flash_windows"


def attend_windows(
    module: nn.Module,
    q_1HNK: Tensor,
    k_1HNK: Tensor,
    v_1HNK: Tensor,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within windows, as transformers' attention functions are called.

    Nothing waits for the device: shapes follow from `max_length_q` alone.

    Args:
        cu_seq_lens_q: int32 [W + 1], where each window starts, and N.
        max_length_q: M.

    Returns:
        [1, N, H, K], and no weights.
    """
    heads = (q_1HNK[0], k_1HNK[0], v_1HNK[0])
    count, longest, windows = q_1HNK.shape[2], int(max_length_q), len(cu_seq_lens_q) - 1
    if windows * longest == count:
        q, k, v = (x.unflatten(1, (windows, longest)).transpose(0, 1) for x in heads)
        out_WHMK = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        return out_WHMK.transpose(1, 2).flatten(0, 1)[None], None
    start_W, end_W = cu_seq_lens_q[:-1].long(), cu_seq_lens_q[1:].long()
    place_M = torch.arange(longest, device=start_W.device)
    real_WM = place_M < (end_W - start_W)[:, None]
    patch_WM = (start_W[:, None] + place_M).clamp(max=count - 1)
    q, k, v = (x[:, patch_WM].transpose(0, 1) for x in heads)
    mask_W11M = real_WM[:, None, None]
    out_WHMK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_W11M, scale=scaling)
    patch_N = torch.arange(count, device=start_W.device)
    window_N = torch.bucketize(patch_N, end_W, right=True)
    return out_WHMK[window_N, :, patch_N - start_W[window_N]][None], None


def use_window_attention(model: nn.Module) -> None:
    """Let a model's vision tower attend window by window in one call, if it has windows.

    Other attention, and an implementation that the user chose, stays as it is.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend_windows)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        takes_windows = "cu_seqlens" in inspect.signature(type(module).forward).parameters
        if takes_windows and getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = NAME

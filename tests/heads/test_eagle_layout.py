"""Heads in EAGLE-1's layout: MSD's, and EAGLE's that see images. The user says which it is.

Tensor names end in their shape: L prompt tokens, N rows, D hidden, V vocabulary, H heads, K size
of a head, S draft tokens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.heads import BASE, edit_tensors, random_tensors, write_head, write_tensors
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.export import convert_head
from vllm_vispec.heads.folder import inspect_head, iter_canonical_tensors, load_draft
from vllm_vispec.utils.errors import ViSpecError

PLAIN = replace(BASE, num_query_tokens=1, global_feature=False, num_key_value_heads=4)
HEADS = {"eagle": replace(PLAIN, compress=False), "msd": replace(PLAIN, compressor="identity")}
EACH = pytest.mark.parametrize("name", HEADS)


def write(folder: Path, name: str, head: HeadConfig) -> None:
    write_tensors(folder, name, head, random_tensors(head))


@EACH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_flags_follow_from_the_tensors(tmp_path: Path, name: str, bias: bool, norm: bool) -> None:
    head = replace(HEADS[name], qkv_bias=bias, fc_bias=not bias, layer0_input_norm=norm)
    write(tmp_path, name, head)
    info = inspect_head(tmp_path, checkpoint_format=name)
    assert (info.checkpoint_format, info.config) == (name, head)


def test_a_format_that_is_not_named_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "msd", HEADS["msd"])
    with pytest.raises(ViSpecError, match='"checkpoint_format":"msd" for an MSD head, "eagle" for'):
        inspect_head(tmp_path)


def test_a_wrong_name_is_refused(tmp_path: Path) -> None:
    write_head(tmp_path / "reference")
    with pytest.raises(ViSpecError, match="'msd', but the head is of the reference format"):
        inspect_head(tmp_path / "reference", checkpoint_format="msd")
    with pytest.raises(ViSpecError, match="'reference' is not one to be named: use eagle or msd"):
        inspect_head(tmp_path / "reference", checkpoint_format="reference")
    write(tmp_path / "cut", "msd", HEADS["msd"])
    edit_tensors(tmp_path / "cut", lambda tensors: tensors.pop("fc.weight"))
    with pytest.raises(ViSpecError, match=r"'msd', but the head is no EAGLE head \(fc"):
        inspect_head(tmp_path / "cut", checkpoint_format="msd")


@EACH
def test_converted_there_and_back(tmp_path: Path, name: str) -> None:
    write(tmp_path / "theirs", name, HEADS[name])
    convert_head(tmp_path / "theirs", tmp_path / "ours", source_format=name)
    info = convert_head(tmp_path / "ours", tmp_path / "back", checkpoint_format=name)
    assert inspect_head(tmp_path / "ours").config == info.config == HEADS[name]
    found = dict(iter_canonical_tensors(info))
    for key, tensor in random_tensors(HEADS[name]).items():
        assert torch.equal(found[key], tensor), key


class SmallDraft:
    """EAGLE-1's draft over whole sequences, with and without MSD's decoupling of image rows."""

    def __init__(self, head: HeadConfig, tensors: dict[str, Tensor], decouple: bool) -> None:
        self.head, self.weights, self.decouple = head, tensors, decouple

    def linear(self, name: str, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x_ND: Tensor) -> Tensor:
        scale_N1 = (x_ND.pow(2).mean(-1, keepdim=True) + self.head.rms_norm_eps).rsqrt()
        return x_ND * scale_N1 * self.weights["layer.post_attention_layernorm.weight"]

    def rotated(self, x_NHK: Tensor) -> Tensor:
        count, size = len(x_NHK), self.head.head_dim
        rate_k = self.head.rope_theta ** -(torch.arange(0, size, 2) / size)
        angle_N1K = (torch.arange(count)[:, None] * rate_k).repeat(1, 2)[:, None]
        first, second = x_NHK.chunk(2, dim=-1)
        return x_NHK * angle_N1K.cos() + torch.cat((-second, first), dim=-1) * angle_N1K.sin()

    def __call__(self, embeds_ND: Tensor, hidden_ND: Tensor, is_image_N: Tensor) -> Tensor:
        """Row n reads the embedding of the token AFTER the one whose hidden state it has."""
        x_ND = self.linear("fc", torch.cat((embeds_ND, hidden_ND), dim=-1))
        if self.decouple:
            x_ND = torch.where(is_image_N[:, None], embeds_ND, x_ND)
        shape = (len(x_ND), self.head.num_attention_heads, self.head.head_dim)
        q_NHK, k_NHK, v_NHK = (
            self.linear(f"layer.self_attn.{name}_proj", x_ND).view(shape) for name in "qkv"
        )
        score_HNN = torch.einsum("nhk,mhk->hnm", self.rotated(q_NHK), self.rotated(k_NHK))
        later_NN = torch.ones(len(x_ND), len(x_ND), dtype=torch.bool).triu(1)
        score_HNN = (score_HNN * self.head.head_dim**-0.5).masked_fill(later_NN, -torch.inf)
        mixed_NHK = torch.einsum("hnm,mhk->nhk", score_HNN.softmax(-1), v_NHK)
        x_ND = x_ND + self.linear("layer.self_attn.o_proj", mixed_NHK.flatten(1))
        normed_ND = self.norm(x_ND)
        gate_ND = F.silu(self.linear("layer.mlp.gate_proj", normed_ND))
        up_ND = self.linear("layer.mlp.up_proj", normed_ND)
        return x_ND + self.linear("layer.mlp.down_proj", gate_ND * up_ND)


@EACH
@pytest.mark.parametrize("runs", [[(3, 8)], [(0, 4), (6, 7)], [(2, 5), (5, 9)], []])
def test_chains_equal_those_of_a_small_definition(
    tmp_path: Path, name: str, runs: list[tuple[int, int]]
) -> None:
    head, length, steps = HEADS[name], 12, 4
    write(tmp_path / "theirs", name, head)
    convert_head(tmp_path / "theirs", tmp_path / "ours", source_format=name)
    generator = torch.Generator().manual_seed(0)
    prompt_LD, hidden_LD = torch.randn(2, length, head.hidden_size, generator=generator)
    lm_head_VD = torch.randn(head.vocab_size, head.hidden_size, generator=generator)
    tensors = random_tensors(head)
    table_VD, small = tensors["embed_tokens.weight"], SmallDraft(head, tensors, name == "msd")

    is_image_N = torch.zeros(length, dtype=torch.bool)
    for start, end in runs:
        is_image_N[max(start, 1) - 1 : end - 1] = True
    embeds_ND = torch.cat((prompt_LD[1:], table_VD[5:6]))
    rows_ND, expected = hidden_LD, []
    for _ in range(steps):
        out_D = small(embeds_ND, rows_ND, is_image_N)[-1]
        expected.append(lm_head_VD @ out_D)
        embeds_ND = torch.cat((embeds_ND, table_VD[expected[-1].argmax()][None]))
        rows_ND = torch.cat((rows_ND, out_D[None]))
        is_image_N = F.pad(is_image_N, (0, 1))

    draft = load_draft(tmp_path / "ours")
    with torch.no_grad():
        state = draft.prefill(prompt_LD, table_VD[5], hidden_LD, runs)
        chain = draft.chain(state, steps, lm_head_VD)
    torch.testing.assert_close(chain.logits_SV, torch.stack(expected), rtol=1e-4, atol=1e-4)

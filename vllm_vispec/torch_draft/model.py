"""The ViSpec draft in pure PyTorch: the yardstick of the engine, and the module to train.

Tensor names end in their shape: B batch, L prompt tokens (= rows before compression), N rows,
D hidden, Q adaptor queries, R image runs, S chain entries, V vocabulary. Parameter names are the
canonical tensor names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vllm_vispec.dialects import inspect_head, iter_canonical_tensors
from vllm_vispec.head_config import HeadConfig
from vllm_vispec.torch_draft.layers import DecoderLayer, ImageAdaptor, KVCache, RMSNorm
from vllm_vispec.torch_draft.rows import RowPlan, Run, plan_rows


@dataclass(frozen=True)
class Prefill:
    """State of one sequence after its prompt.

    Attributes:
        plan: the compact rows.
        adaptor_RQD: adaptor output of every run.
        global_D: global feature of all later rows (zeros without an image).
        layer_in_ND: input rows of the decoder layer.
        out_ND: output rows; the last one feeds lm_head and the next step.
        cache: keys and values of the compact rows, each [1, G, N, K].
    """

    plan: RowPlan
    adaptor_RQD: Tensor
    global_D: Tensor
    layer_in_ND: Tensor
    out_ND: Tensor
    cache: KVCache


@dataclass(frozen=True)
class Chain:
    """A greedy chain of S draft tokens.

    Attributes:
        token_ids_S: the tokens.
        logits_SV: logits behind each.
        hidden_SD: draft output behind each (input of lm_head and of the next step).
        layer_in_SD: decoder layer input of the row that produced it.
        positions: RoPE position of that row.
    """

    token_ids_S: Tensor
    logits_SV: Tensor
    hidden_SD: Tensor
    layer_in_SD: Tensor
    positions: tuple[int, ...]


class ViSpecDraft(nn.Module):
    """One ViSpec head."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.embed_tokens = (
            nn.Embedding(config.vocab_size, size) if config.has_embed_tokens else None
        )
        self.fc = nn.Linear(2 * size, size, bias=config.fc_bias)
        self.img_fc = nn.Linear(2 * size, size, bias=config.fc_bias) if config.has_img_fc else None
        self.img_adaptor = ImageAdaptor(config) if config.has_adaptor else None
        self.layer = DecoderLayer(config)
        self.norm = RMSNorm(size, config.rms_norm_eps) if config.final_norm else None
        self._start_as_identity()

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> ViSpecDraft:
        """Load a head of any dialect.

        Raises:
            ViSpecError: see `vllm_vispec.dialects.inspect_head`.
        """
        draft = cls(inspect_head(folder).config)
        draft.load_state_dict(dict(iter_canonical_tensors(folder)))
        return draft.to(dtype)

    @torch.no_grad()
    def _start_as_identity(self) -> None:
        """img_fc = [I | 0]: a fresh head passes the hidden state on and ignores images."""
        if self.img_fc is None:
            return
        nn.init.eye_(self.img_fc.weight[:, : self.config.hidden_size])
        self.img_fc.weight[:, self.config.hidden_size :].zero_()
        if self.img_fc.bias is not None:
            self.img_fc.bias.zero_()

    def adaptor(self, image_TD: Tensor) -> Tensor:
        """Embeddings of one image run [T, D] -> [Q, D]; the last row is the global feature."""
        return self.adaptor_rows([image_TD])[0]

    def adaptor_rows(self, images: Sequence[Tensor]) -> Tensor:
        """Embeddings of image runs, each [T, D] with its own T -> [R, Q, D], all at once.

        Zeros for a head without adaptor, in which no row reads them.
        """
        shape = (len(images), self.config.num_query_tokens, self.config.hidden_size)
        if self.img_adaptor is None or not images:
            return self.fc.weight.new_zeros(shape)
        images_RTD = nn.utils.rnn.pad_sequence(list(images), batch_first=True)
        sizes_R = torch.tensor([len(image) for image in images], device=images_RTD.device)
        if len({len(image) for image in images}) == 1:
            return self.img_adaptor(images_RTD)
        index_T = torch.arange(images_RTD.shape[1], device=images_RTD.device)
        return self.img_adaptor(images_RTD, index_T < sizes_R[:, None])

    def layer_input(self, embeds_ND: Tensor, hidden_ND: Tensor, global_ND: Tensor) -> Tensor:
        """Fuse text rows [..., D]: f = img_fc([hidden, global]), x = fc([embedding, f]).

        Without a global feature f is the hidden state.
        """
        if self.img_fc is None:
            return self.fc(torch.cat((embeds_ND, hidden_ND), dim=-1))
        fused_ND = self.img_fc(torch.cat((hidden_ND, global_ND.expand_as(hidden_ND)), dim=-1))
        return self.fc(torch.cat((embeds_ND, fused_ND), dim=-1))

    def run_layer(
        self,
        x_BND: Tensor,
        positions_BN: Tensor,
        mask_BNM: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, KVCache]:
        """Decoder layer and, if the head has one, final norm.

        Args:
            mask_BNM: True where a row may look; None = causal, cache first.
        Returns:
            Output rows [B, N, D] and the cache including them.
        """
        out_BND, cache = self.layer(x_BND, positions_BN, mask_BNM, cache)
        return (out_BND if self.norm is None else self.norm(out_BND)), cache

    def prefill(
        self,
        prompt_embeds_LD: Tensor,
        next_embed_D: Tensor,
        hidden_LD: Tensor,
        runs: Sequence[Run] = (),
    ) -> Prefill:
        """Draft prefill of one prompt.

        Args:
            prompt_embeds_LD: the TARGET's input embeddings, image features scattered in.
            next_embed_D: draft embedding of the first token the target sampled.
            hidden_LD: the target's hidden states after its final norm.
            runs: image runs [start, end) in prompt indices.
        """
        plan = plan_rows(
            len(prompt_embeds_LD),
            runs,
            self.config.num_query_tokens,
            compress=self.config.compress,
        )
        adaptor_RQD = self.adaptor_rows([prompt_embeds_LD[a:b] for a, b in plan.runs])
        shifted_LD = torch.cat((prompt_embeds_LD[1:], next_embed_D[None]))
        layer_in_ND = self._compact_rows(plan, adaptor_RQD, shifted_LD, hidden_LD)
        positions_N = torch.tensor(plan.positions, device=hidden_LD.device)
        out_BND, cache = self.run_layer(layer_in_ND[None], positions_N[None])
        global_D = adaptor_RQD[-1, -1] if plan.runs else torch.zeros_like(next_embed_D)
        return Prefill(plan, adaptor_RQD, global_D, layer_in_ND, out_BND[0], cache)

    def _compact_rows(
        self, plan: RowPlan, adaptor_RQD: Tensor, shifted_LD: Tensor, hidden_LD: Tensor
    ) -> Tensor:
        """Decoder layer input of the compact rows [N, D].

        Every row is fused as if it were text, then image rows are overwritten: no branches on
        row counts, and autograd sees only what is used.
        """
        device = hidden_LD.device
        index_N = torch.tensor(plan.positions, device=device)
        run_N = torch.tensor(plan.run_of_row, device=device)
        row_N = torch.tensor(plan.adaptor_row, device=device)
        zero_D = torch.zeros_like(shifted_LD[:1])
        # One row of zeros behind the last run, so that run -1 (no image yet) finds it.
        globals_RD = torch.cat((adaptor_RQD[:, -1], zero_D))
        text_ND = self.layer_input(shifted_LD[index_N], hidden_LD[index_N], globals_RD[run_N])
        if not plan.runs:
            return text_ND
        image_ND = adaptor_RQD[run_N.clamp(min=0), row_N.clamp(min=0)]
        return torch.where(row_N[:, None] >= 0, image_ND, text_ND)

    def step(
        self, embed_D: Tensor, hidden_D: Tensor, global_D: Tensor, position: int, cache: KVCache
    ) -> tuple[Tensor, Tensor, KVCache]:
        """One row behind the cache.

        Returns:
            Its output [D], its layer input [D], and the cache including it.
        """
        out_ND, layer_in_ND, cache = self.extend(
            embed_D[None], hidden_D[None], global_D, position, cache
        )
        return out_ND[0], layer_in_ND[0], cache

    def extend(
        self,
        embeds_ND: Tensor,
        hidden_ND: Tensor,
        global_D: Tensor,
        first_position: int,
        cache: KVCache,
    ) -> tuple[Tensor, Tensor, KVCache]:
        """Consecutive rows behind the cache: the catch-up on verified tokens.

        Returns:
            Output rows [N, D], layer input [N, D], and the cache including them.
        """
        layer_in_ND = self.layer_input(embeds_ND, hidden_ND, global_D)
        positions_N = torch.arange(len(embeds_ND), device=embeds_ND.device) + first_position
        out_BND, cache = self.run_layer(layer_in_ND[None], positions_N[None], cache=cache)
        return out_BND[0], layer_in_ND, cache

    @torch.no_grad()
    def chain(
        self,
        prefill: Prefill,
        num_tokens: int,
        lm_head_VD: Tensor,
        embed_VD: Tensor | None = None,
    ) -> Chain:
        """Draft `num_tokens` tokens greedily from the end of a prompt.

        Args:
            lm_head_VD: the target's lm_head.
            embed_VD: the target's embedding table, needed if the head has none of its own.
        """
        table_VD = embed_VD if self.embed_tokens is None else self.embed_tokens.weight
        if table_VD is None:
            raise ValueError("the head has no embed_tokens: pass the target's table as embed_VD")
        hidden_D, layer_in_D = prefill.out_ND[-1], prefill.layer_in_ND[-1]
        cache, position = prefill.cache, prefill.plan.length - 1
        ids, logits, hiddens, inputs = [], [], [], []
        for _ in range(num_tokens):
            logits.append(lm_head_VD @ hidden_D)
            ids.append(logits[-1].argmax())
            hiddens.append(hidden_D)
            inputs.append(layer_in_D)
            if len(ids) < num_tokens:
                position += 1
                hidden_D, layer_in_D, cache = self.step(
                    table_VD[ids[-1]], hidden_D, prefill.global_D, position, cache
                )
        first = prefill.plan.length - 1
        return Chain(
            torch.stack(ids),
            torch.stack(logits),
            torch.stack(hiddens),
            torch.stack(inputs),
            tuple(range(first, first + num_tokens)),
        )

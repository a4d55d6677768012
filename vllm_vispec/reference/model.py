"""The ViSpec draft in pure PyTorch: the yardstick of the engine, and the module to train.

Tensor names end in their shape: B batch, L prompt tokens (= rows before compression), N rows,
M keys (cache included), D hidden, Q adaptor queries, R image runs, A compressed tokens, S chain
entries, V vocabulary. Parameter names are the canonical tensor names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_vispec.compressors.compressor import ImageCompressor
from vllm_vispec.compressors.reference_gate import biased_mask, prompt_key_bias
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.reference.base import Draft
from vllm_vispec.reference.layers import DecoderLayer, ImageAdaptor, KVCache, RMSNorm
from vllm_vispec.reference.rows import RowPlan, Run, plan_rows
from vllm_vispec.reference.states import Chain, Prefill


class ViSpecDraft(Draft):
    """One ViSpec head."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.embed_tokens = (
            nn.Embedding(config.vocab_size, size) if config.has_embed_tokens else None
        )
        self.fc = nn.Linear(2 * size, size, bias=config.fc_bias)
        self.img_fc = nn.Linear(2 * size, size, bias=config.fc_bias) if config.has_img_fc else None
        self.img_adaptor = ImageAdaptor(config) if config.has_adaptor else None
        self.layer = DecoderLayer(config)
        self.norm = RMSNorm(size, config.rms_norm_eps) if config.final_norm else None
        self.compressor = (
            ImageCompressor(
                config.compressor_spec, size, config.num_attention_heads, config.qkv_bias
            )
            if config.has_compressor
            else None
        )
        self._start_as_identity()

    def output_head(self, target_VD: Tensor, token_ids_V: Tensor | None = None) -> Tensor:
        """The target's lm_head, see `Draft.output_head`."""
        return target_VD

    def distinct_passes(self, passes: int) -> int:
        """All: every pass reads the states of the one before."""
        return passes

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
        return self.img_adaptor.of_images(images)

    def image_tokens(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Decoder layer inputs [M, D] of every image [T, D], each compressed by itself.

        ViSpec's adaptor rows go in as they are, without the last. Other compressors' tokens are
        embeddings: they go through the embedding half of `fc`, without bias, state or global
        feature.
        """
        if self.compressor is None:
            return list(self.adaptor_rows(images)[:, :-1])
        if not images:
            return []
        tokens = self.compressor(images)
        input_AD = F.linear(torch.cat(tokens), self.fc.weight[:, : self.config.hidden_size])
        return list(input_AD.split([len(one) for one in tokens]))

    def read_images(
        self, images: Sequence[Tensor], runs: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Adaptor rows [R, Q, D] of runs and `image_tokens` of images; ViSpec's come from one call.

        Args:
            images, runs: embeddings as `plan` says, each [T, D]; the same for ViSpec's adaptor.
        """
        adaptor_RQD = self.adaptor_rows(runs)
        if self.compressor is None:
            return adaptor_RQD, list(adaptor_RQD[:, :-1]) if images else []
        return adaptor_RQD, self.image_tokens(images)

    def plan(self, length: int, runs: Sequence[Run]) -> RowPlan:
        """The compact rows of a prompt of `length` tokens with images at `runs`."""
        config = self.config
        return plan_rows(
            length,
            runs,
            config.num_query_tokens,
            compress=config.compress,
            compressor=config.compressor_spec,
        )

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
            mask_BNM: True where a row may look, or what is added to scores; None = causal, cache
                first.

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
        answer_start: int | None = None,
    ) -> Prefill:
        """Draft prefill of one prompt.

        Args:
            prompt_embeds_LD: the TARGET's input embeddings, image features scattered in.
            next_embed_D: draft embedding of the first token the target sampled.
            hidden_LD: the target's hidden states after its final norm.
            runs: images [start, end) in prompt indices.
            answer_start: where the answer begins if the prompt holds a part of it, at least 1; a
                gate reads the state before it. None: behind the prompt.
        """
        plan = self.plan(len(prompt_embeds_LD), runs)
        adaptor_RQD, tokens = self.read_images(
            [prompt_embeds_LD[a:b] for a, b in plan.images],
            [prompt_embeds_LD[a:b] for a, b in plan.runs],
        )
        shifted_LD = torch.cat((prompt_embeds_LD[1:], next_embed_D[None]))
        layer_in_ND = self._compact_rows(plan, adaptor_RQD, tokens, shifted_LD, hidden_LD)
        positions_N = torch.tensor(plan.positions, device=hidden_LD.device)
        gate_row = (plan.length if answer_start is None else answer_start) - 1
        bias_N = prompt_key_bias(self, hidden_LD[gate_row], plan.branch_of_row)
        mask_1NN = biased_mask(bias_N, positions_N >= gate_row, len(positions_N))
        out_BND, cache = self.run_layer(layer_in_ND[None], positions_N[None], mask_1NN)
        global_D = adaptor_RQD[-1, -1] if plan.runs else torch.zeros_like(next_embed_D)
        return Prefill(plan, adaptor_RQD, global_D, layer_in_ND, out_BND[0], cache, bias_N)

    def _compact_rows(
        self,
        plan: RowPlan,
        adaptor_RQD: Tensor,
        tokens: Sequence[Tensor],
        shifted_LD: Tensor,
        hidden_LD: Tensor,
    ) -> Tensor:
        """Decoder layer input of the compact rows [N, D].

        Every row is fused as if it were text, then image rows are overwritten: no branches on
        row counts, and autograd sees only what is used.
        """
        device = hidden_LD.device
        index_N = torch.tensor(plan.positions, device=device)
        run_N = torch.tensor(plan.run_of_row, device=device)
        filler_N = torch.tensor(plan.filler_of_row([len(one) for one in tokens]), device=device)
        zero_D = torch.zeros_like(shifted_LD[:1])
        # One row of zeros behind the last run, so that run -1 (no image yet) finds it.
        globals_RD = torch.cat((adaptor_RQD[:, -1], zero_D))
        text_ND = self.layer_input(shifted_LD[index_N], hidden_LD[index_N], globals_RD[run_N])
        if not tokens:
            return text_ND
        image_ND = torch.cat((*tokens, zero_D))[filler_N]
        return torch.where(filler_N[:, None] >= 0, image_ND, text_ND)

    def step(
        self,
        embed_D: Tensor,
        hidden_D: Tensor,
        global_D: Tensor,
        position: int,
        cache: KVCache,
        key_bias_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, KVCache]:
        """One row behind the cache; `key_bias_N` is the prefill's.

        Returns:
            Its output [D], its layer input [D], and the cache including it.
        """
        out_ND, layer_in_ND, cache = self.extend(
            embed_D[None], hidden_D[None], global_D, position, cache, key_bias_N
        )
        return out_ND[0], layer_in_ND[0], cache

    def extend(
        self,
        embeds_ND: Tensor,
        hidden_ND: Tensor,
        global_D: Tensor,
        first_position: int,
        cache: KVCache,
        key_bias_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, KVCache]:
        """Consecutive rows behind the cache: the catch-up on verified tokens.

        Args:
            key_bias_N: the prefill's, of the first keys of the cache.

        Returns:
            Output rows [N, D], layer input [N, D], and the cache including them.
        """
        layer_in_ND = self.layer_input(embeds_ND, hidden_ND, global_D)
        positions_N = torch.arange(len(embeds_ND), device=embeds_ND.device) + first_position
        all_N = torch.ones_like(positions_N, dtype=torch.bool)
        mask_1NM = biased_mask(key_bias_N, all_N, cache[0].shape[2] + len(embeds_ND))
        out_BND, cache = self.run_layer(layer_in_ND[None], positions_N[None], mask_1NM, cache)
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
                    table_VD[ids[-1]],
                    hidden_D,
                    prefill.global_D,
                    position,
                    cache,
                    prefill.key_bias_N,
                )
        first = prefill.plan.length - 1
        return Chain(
            torch.stack(ids),
            torch.stack(logits),
            torch.stack(hiddens),
            torch.stack(inputs),
            tuple(range(first, first + num_tokens)),
        )

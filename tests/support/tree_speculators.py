"""V2's `TreeSpeculator` without an engine: vLLM's buffers, and a draft made of a few operators."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.input_batch import InputBuffers

from vllm_vispec.draft_model.speculator import PublishedTreeSpeculator
from vllm_vispec.trees.codes import CodeBuffers
from vllm_vispec.trees.cudagraph import RecordedVerification
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.trees.speculator import TreeSpeculator
from vllm_vispec.trees.verify import TreeTable

CPU = torch.device("cpu")
LAYER = "draft"
WIDTH, VOCAB, BLOCK, NUM_BLOCKS = 6, 50, 4, 64
_HEAD = (2, 8, 40)


class Blocks:
    """vLLM's block tables as far as drafting knows them, in torch operators."""

    cp_size = 1

    def __init__(self, max_num_requests: int, max_num_tokens: int) -> None:
        self.tables = torch.zeros(max_num_requests, 16, dtype=torch.int64)
        self.input_block_tables = [torch.zeros_like(self.tables)]
        self.slot_mappings = torch.full((1, max_num_tokens), -1)

    def gather_block_tables(self, idx_mapping: torch.Tensor, num_reqs_padded: int) -> None:
        """Bring the tables of a batch's requests to the front."""
        self.input_block_tables[0][: len(idx_mapping)] = self.tables[idx_mapping]

    def get_dummy_block_tables(self, num_reqs: int) -> list[torch.Tensor]:
        """Return the tables that graphs read, empty."""
        return [table[:num_reqs].zero_() for table in self.input_block_tables]

    def get_dummy_slot_mappings(self, num_tokens: int) -> torch.Tensor:
        """Return the slots that graphs read, none."""
        return self.slot_mappings.fill_(-1)[:, :num_tokens]

    def compute_slot_mappings(
        self, idx: torch.Tensor, starts: torch.Tensor, positions: torch.Tensor, num_tokens: int
    ) -> torch.Tensor:
        """Write the slots of a batch; none for padding."""
        rows = torch.arange(num_tokens)
        owner = torch.searchsorted(starts[1:], rows, right=True).clamp(max=len(idx) - 1)
        slots = self.tables[idx[owner], positions // BLOCK] * BLOCK + positions % BLOCK
        is_real = (idx[owner] >= 0) & (rows < starts[-1])
        self.slot_mappings[0, :num_tokens] = torch.where(is_real, slots, -1)
        return self.slot_mappings[:, :num_tokens]


class Speculative(SimpleNamespace):
    """vLLM's `SpeculativeConfig`, as far as its graph managers know it."""

    def uses_dynamic_speculative_decoding(self) -> bool:
        """Whether there is a load schedule."""
        return self.num_speculative_tokens_per_batch_size is not None


def _config(settings: TreeSettings, nodes: int, max_num_reqs: int, max_num_tokens: int) -> Any:
    """Return what vLLM's graph managers read of a configuration."""
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=16 * BLOCK),
        scheduler_config=SimpleNamespace(
            max_num_seqs=max_num_reqs, max_num_batched_tokens=max_num_tokens
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        compilation_config=SimpleNamespace(
            cudagraph_capture_sizes=[1, 2, 4, 8, 16, 24],
            max_cudagraph_capture_size=24,
        ),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        speculative_config=Speculative(
            num_speculative_tokens_per_batch_size=None,
            num_speculative_tokens=nodes,
        ),
        num_speculative_tokens=nodes,
    )


class SmallTreeSpeculator(TreeSpeculator):
    """Drafts with a made-up model that reads all that a pass is told, and a cache by slot."""

    def __new__(cls, *args: Any, **kwargs: Any) -> SmallTreeSpeculator:
        return object.__new__(cls)

    def __init__(
        self, settings: TreeSettings, nodes: int, max_num_reqs: int, max_num_tokens: int
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.max_num_reqs, self.max_num_tokens = max_num_reqs, max_num_tokens
        self.hidden_size, self.dtype, self.device = WIDTH, torch.float32, CPU
        self.dp_size, self.dp_rank = 1, 0
        self.num_speculative_steps = nodes
        self._settings, self._schedules_chains = settings, False
        self.vllm_config = _config(settings, nodes, max_num_reqs, max_num_tokens)
        self.speculative_config = self.vllm_config.speculative_config
        if not isinstance(getattr(type(self), "max_model_len", None), property):
            self.max_model_len = 16 * BLOCK
        self.input_buffers = InputBuffers(max_num_reqs, max_num_tokens, CPU)
        self.idx_mapping = torch.full((max_num_reqs,), -1)
        self.draft_tokens = torch.zeros(max_num_reqs, nodes, dtype=torch.int64)
        self.hidden_states = torch.zeros(max_num_tokens, WIDTH)
        self.codes = CodeBuffers(
            settings.levels, settings.top_k, max_num_tokens, torch.float32, CPU
        )
        self.query, self.key = self.codes.query_buffer(_HEAD), self.codes.key_buffer(_HEAD)
        self.table = TreeTable(settings.levels, nodes, max_num_reqs, CPU)
        self.rows = torch.arange(max_num_tokens)
        self.draft_rows: Any = SimpleNamespace(select_rows=self._select_rows)
        self.model: Any = SimpleNamespace(compute_logits=self._logits)
        self.embedding = torch.randn(VOCAB, WIDTH, generator=generator)
        self.head = 3 * torch.randn(WIDTH, VOCAB, generator=generator)
        self.passes: list[Any] = []
        self.has_cache = False
        self._allocate(self.codes)

    def place_keys(self) -> None:
        """Do what `set_attn` does."""
        self.block_tables: Any = Blocks(self.max_num_reqs, self.max_num_tokens)
        blocks = torch.arange(self.max_num_reqs * 16).view(-1, 16)
        self.block_tables.tables.copy_(blocks)
        self.cache = torch.zeros(self.max_num_reqs * 16 * BLOCK, WIDTH)
        group = SimpleNamespace(layer_names=[LAYER])
        self.kv_cache_config: Any = SimpleNamespace(kv_cache_groups=[group])
        self.attn_groups: Any = []
        self.target_attn_groups: Any = []
        self.target_input_buffers = self.input_buffers
        self.last_token_indices = torch.zeros(self.max_num_reqs, dtype=torch.int64)
        sizes = self.max_num_reqs, self.max_num_tokens
        self.model_state: Any = SimpleNamespace(
            prepare_attn=lambda *args, **kwargs: {LAYER: self.input_buffers},
            linear_requests=lambda req_ids: None,
            recorded_verification=RecordedVerification(self.table, *sizes),
        )
        self.attn_cg_support: Any = SimpleNamespace(
            min_cg_support=AttentionCGSupport.ALWAYS, min_cg_attn_backend=None
        )
        self.supports_decode_metadata_update = True
        self.trees: Any = SimpleNamespace(table=self.table, move_accepted=lambda *args: None)

    def _prefill(self, *args: Any, **kwargs: Any) -> None:
        """Leave the roots to the tests."""

    def on_prefill_begin(self, num_reqs: int) -> None:
        """Nothing has rows to be told."""

    def on_prefill_end(self, num_reqs: int) -> None:
        """Nothing has rows to be told."""

    def _select_rows(self, index: torch.Tensor) -> None:
        self.rows[: len(index)] = self.rows[index]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.head

    def _build_uniform_attn_metadata(self, **kwargs: Any) -> dict[str, Any]:
        return {LAYER: self.input_buffers}

    def _update_draft_decode_metadata(self, attn_metadata: Any, num_reqs: int) -> None:
        assert attn_metadata[LAYER] is self.input_buffers

    def _run_model(
        self,
        num_tokens: int,
        attn_metadata: Any,
        slot_mappings: Any,
        num_tokens_across_dp: Any,
        cudagraph_runtime_mode: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix tokens, positions, states, rows and codes, and the cache where there is one."""
        self.passes.append((num_tokens, attn_metadata is not None, slot_mappings is not None))
        buffers = self.input_buffers
        mixed = self.embedding[buffers.input_ids[:num_tokens].long()]
        mixed = mixed + self.hidden_states[:num_tokens]
        mixed = mixed + buffers.positions[:num_tokens, None] / 7 + self.rows[:num_tokens, None] / 9
        for rows in (self.query, self.key):
            padded, _ = rows.views(num_tokens)
            mixed = mixed + padded.sum((1, 2))[:, None] / 1000
        if attn_metadata is not None:
            slots = slot_mappings[LAYER]
            # The last row of the cache takes what is stored nowhere.
            self.cache.index_copy_(0, slots[:num_tokens] % len(self.cache), mixed)
            starts = buffers.query_start_loc
            owner = torch.searchsorted(starts[1:], torch.arange(num_tokens), right=True)
            owner = owner.clamp(max=self.max_num_reqs - 1)
            table = self.block_tables.input_block_tables[0][owner, 0]
            length = buffers.seq_lens[owner]
            mixed = mixed + self.cache[table * BLOCK] + length[:, None] / 11
        hidden = torch.tanh(mixed)
        return hidden, hidden


class SmallPublishedTreeSpeculator(  # type: ignore[misc]
    SmallTreeSpeculator, PublishedTreeSpeculator
):
    """The same with roots behind the first pass."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.num_speculative_steps += 1
        shape = self.max_num_reqs, self.num_speculative_steps
        self.draft_tokens = torch.zeros(shape, dtype=torch.int64)
        self.root_tokens = torch.zeros(self.max_num_reqs, dtype=torch.int64)
        self._rotary_AT = self._batch = None

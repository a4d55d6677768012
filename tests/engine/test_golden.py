"""The engine reproduces every golden case: output ids and the acceptance of every step.

Chains, trees, and heads whose adaptor is replaced by a compressor, which changes no output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.support import golden
from tests.support.engine import Completion, StartEngine, StartProcess
from tests.support.golden import GoldenCase
from tests.support.runners import runners
from tests.support.tiny_store import with_compressor
from vllm_vispec.compressors.spec import COMBINATIONS, IDENTITY, PRIMITIVES, QUERY, parse_compressor

CASES = golden.load_cases()
# By target: Llava's images have more tokens and touch, Qwen's are small.
COMPRESSORS = {
    "llava": ("prune:4", "conv:3", "concat", "select"),
    "qwen": ("pool:3", "resampler:3", "text_only", "weighted", "select(prune:1,text_only)"),
}
Serve = Callable[..., Completion]

pytestmark = [pytest.mark.golden, pytest.mark.timeout(1800)]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_mode = pytest.mark.parametrize("mode", ["chain", "tree"])


@pytest.fixture(scope="module")
def serve(
    engine: StartEngine, child: StartProcess, tmp_path_factory: pytest.TempPathFactory
) -> Serve:
    """Return what serves one case alone, so that its steps are those of a single request."""
    folder = tmp_path_factory.mktemp("golden")

    def serve(runner: str, case: GoldenCase, mode: str = "chain", compressor: str = "") -> Any:
        # The targets' heads are padded: for chains here, for trees by their codes.
        process = child(runner, process=f"golden {mode}")
        process.call(allow_small_heads if mode == "chain" else allow_unequal_llava_next_embeds)
        model, draft = folder / case.target_dir.name, case.draft_dir
        if not model.exists():
            golden.materialise_target(case.target_dir, model)
        if compressor:
            head = folder / f"{model.name}-{compressor.replace(':', '-')}"
            draft = with_compressor(draft, head, compressor)
        tree = {"num_draft_tokens": golden.TREE_NODES, "tree": golden.TREE}
        found = engine(
            runner,
            process=f"golden {mode}",
            model=str(model),
            draft=str(draft),
            max_model_len=512,
            enable_prefix_caching=False,
            enable_mm_embeds=True,
            **(tree if mode == "tree" else {"num_draft_tokens": case.num_draft_tokens}),
        )
        prompt = golden.engine_prompt(case, model)
        return found.generate([prompt], len(case.ints("greedy_ids")))[0]

    return serve


def test_golden_cases_exist() -> None:
    assert CASES, f"no */case.json below {golden.golden_dir()}: check VISPEC_GOLDEN_DIR"


@every_case
@every_mode
@pytest.mark.parametrize("runner", runners("v1", "v2", "v1-overlay", "v2-overlay"))
def test_golden(serve: Serve, case: GoldenCase, mode: str, runner: str) -> None:
    """Greedy ids equal the recorded ones; so does the acceptance of every recorded step."""
    found, recorded = serve(runner, case, mode), case.steps(mode)
    assert found.token_ids == case.ints("greedy_ids")
    assert found.per_step_accepted[: len(recorded)] == recorded


@every_case
@every_mode
def test_recorded_steps_fit(case: GoldenCase, mode: str) -> None:
    """The recorded steps end before the greedy ids do, so that every step is compared."""
    assert sum(accepted + 1 for accepted in case.steps(mode)) <= len(case.ints("greedy_ids"))


def test_every_compressor_is_among_them() -> None:
    names = {parse_compressor(text).name for texts in COMPRESSORS.values() for text in texts}
    # MSD has a definition of its own to be compared with: tests/heads/test_eagle_layout.py.
    assert names == {*PRIMITIVES, *COMBINATIONS} - {QUERY, IDENTITY}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "compressor"),
    [(target, text) for target, texts in COMPRESSORS.items() for text in texts],
)
def test_golden_ids_with_compressors(serve: Serve, target: str, compressor: str) -> None:
    cases = [case for case in CASES if case.name.startswith(target)]
    assert len(cases) >= 3
    for case in cases:
        # One draft for all, whichever number of queries the recorded ones had.
        case = replace(case, draft_dir=cases[0].draft_dir, num_draft_tokens=5)
        found = serve("v1", case, compressor=compressor)
        assert found.token_ids == case.ints("greedy_ids")
        assert found.drafted


SMALLEST_HEAD = 32


@functools.cache
def allow_small_heads() -> None:
    """Let a CPU engine serve head sizes below the smallest of vLLM's CPU attention.

    Zero-padding queries, keys and values with an unchanged scale leaves the result untouched, so
    such layers are widened and their output is sliced. Others run vLLM's own code unchanged.
    """
    import torch
    from vllm.model_executor.layers.attention import Attention

    allow_unequal_llava_next_embeds()
    original_init, original_forward = Attention.__init__, Attention.forward

    def init(self: Any, num_heads: int, head_size: int, *args: Any, **kwargs: Any) -> None:
        original_init(self, num_heads, max(head_size, SMALLEST_HEAD), *args, **kwargs)
        self.unpadded_head_size = head_size

    def forward(self: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        size, padded = self.unpadded_head_size, self.head_size
        if size == padded:
            return original_forward(self, query, key, value, *args, **kwargs)

        def pad(part: Any) -> Any:
            heads = part.reshape(len(part), -1, size)
            return torch.nn.functional.pad(heads, (0, padded - size)).reshape(len(part), -1)

        output = original_forward(self, pad(query), pad(key), pad(value))
        rows = output.view(len(output), -1, padded)[..., :size]
        return rows.reshape(len(output), -1)

    Attention.__init__, Attention.forward = init, forward


def allow_unequal_llava_next_embeds() -> None:
    """Let one encoder batch hold ``image_embeds`` of different lengths (pixel values may)."""
    from typing import Annotated

    import torch
    from vllm.model_executor.models.llava_next import LlavaNextImageEmbeddingInputs
    from vllm.utils.tensor_schema import TensorShape

    shape = TensorShape("bn", "ifs", "hs", dynamic_dims={"ifs"})
    LlavaNextImageEmbeddingInputs.__annotations__["data"] = Annotated[
        torch.Tensor | list[torch.Tensor], shape
    ]

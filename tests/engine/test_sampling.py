"""At temperature 1, tokens have the distribution of plain sampling.

Two samples of ``DRAWS`` continuations of one prompt, drawn without speculation and with chains,
trees or single paths, are compared by a G-test over their first one, two and three tokens (rare
prefixes in a few pools). Tokens after the first come from the verification of drafts. Each test has
``ALPHA`` as its chance of a false alarm; the draws are seeded, so a result does not change from run
to run. Power: a verifier that lets a share ``BIAS`` of its decisions fall on the likeliest token is
found with a probability of at least 95 %, which is measured on simulated counts. Both depend on the
runner: V2 under the interpreter is slow.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from tests.support.drafts import tree
from tests.support.engine import StartEngine
from tests.support.heads import edit_tensors
from tests.support.runners import runners
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import Request, Served, image_text, serve_requests, words

if TYPE_CHECKING:
    import torch
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

ALPHA = 0.001
DRAWS = {"v1": 4000, "v2": 400}
BIAS = {"v1": 0.15, "v2": 0.6}
NUM_TOKENS = 3
# Flattens the tiny target's distribution so that the likeliest token has well below 90 %.
LOGIT_FACTOR = 0.7
DRAFTS: Mapping[str, Mapping[str, Any]] = {
    "spec": {},
    # Two levels, as many as there are tokens behind the first.
    "tree": tree(6, depth=1, top_k=3),
    # Paths of one or two tokens, as sure as the draft is.
    "path": tree(2, policy="spec_llava", depth=1, top_k=1, threshold=0.99),
    # Verified by the probabilities that it was drawn with.
    "sibling": {"config": {"draft_sample_method": "probabilistic"}},
}
Prefix = tuple[int, ...]


@pytest.mark.parametrize("runner", runners("v1", "v2"))
def test_same_distribution(
    engine: StartEngine, tiny: TinyStore, tmp_path: Path, runner: str
) -> None:
    soft = soften(tiny.target(), tmp_path / "soft")
    options: dict[str, Any] = {"model": str(soft), "max_num_seqs": 64}
    plain = engine(runner, **options).run(_sample, DRAWS[runner], 1000)
    # V2's draws with trees are those of plain decoding, one by one: `test_same_seeds_same_tokens`.
    for index, name in enumerate(DRAFTS if runner == "v1" else ["spec", "path"]):
        draft = tiny.sibling() if name == "sibling" else tiny.head()
        drafting = engine(runner, **options, draft=draft, **DRAFTS[name])
        found: Served = drafting.run(_sample, DRAWS[runner], 1001 + index)
        for length in (1, 2, 3):
            counts = table(_prefixes(plain, length), _prefixes(found, length))
            filled = (counts.sum(axis=0) >= 2 * MIN_EXPECTED).sum()
            # The first token involves no draft, and one token takes nearly all of its probability.
            assert filled >= (1 if length == 1 else 3), "the target is sure of its tokens"
            assert p_value(counts) > ALPHA, (name, length)
        # Some drafts were accepted and some were not.
        drafted, accepted = (sum(numbers) for numbers in zip(*found.steps(), strict=True))
        assert 0.01 < accepted / drafted < 0.98, name
    for length in (2, 3):
        # A biased sampler is found nearly always, an unbiased one hardly ever.
        draws = _prefixes(plain, length)
        assert rejection_rate(draws, BIAS[runner]) >= 0.95
        assert rejection_rate(draws, 0.0) <= 0.02


TEMPERATURES = (0.0, 0.4, 0.8, 1.2)
SEEDED = [
    Request(
        f"seed-{i}",
        f"{image_text(KIND, 1)} {words(i, 6)}",
        (i,),
        10,
        # No top_p: vLLM's kernel for it does not run under Triton's interpreter.
        {"temperature": TEMPERATURES[i % len(TEMPERATURES)], "seed": i},
    )
    for i in range(6)
]


@pytest.mark.parametrize("is_sibling", [False, True], ids=["head", "published model"])
@pytest.mark.parametrize("runner", runners("v2"))
def test_same_seeds_same_tokens(
    engine: StartEngine, tiny: TinyStore, runner: str, is_sibling: bool
) -> None:
    """V2 with trees draws what plain decoding draws.

    V2 keys a draw by a request's seed and the position of the token, so that a tree whose nodes
    have the positions of their levels meets the draws plain decoding would have made.
    """
    options = {"max_num_batched_tokens": 128}
    plain = engine(runner, **options).run(serve_requests, SEEDED)
    draft = tiny.sibling() if is_sibling else tiny.head()
    drafting = engine(runner, **options, draft=draft, **tree(29, top_k=8))
    found = drafting.run(serve_requests, SEEDED)
    assert found.outputs() == plain.outputs()
    assert len({str(tokens) for tokens in plain.outputs().values()}) == len(SEEDED)
    assert found.acceptance() > 0


def soften(target: Path, folder: Path) -> Path:
    """Copy ``target`` with its logits scaled down: tiny targets are sure of themselves."""

    def scale(tensors: dict[str, torch.Tensor]) -> None:
        (name,) = (name for name in tensors if name.endswith("lm_head.weight"))
        tensors[name] *= LOGIT_FACTOR

    shutil.copytree(target, folder)
    edit_tensors(folder, scale)
    return folder


def _sample(llm: LLM, count: int, seed: int) -> Served:
    """Draw ``count`` continuations of one prompt at temperature 1.

    Seeds of single requests would not do: with them, V1 on CPU fails as soon as a prompt is split
    ("CPU Generator does not use offset"), with and without speculation.
    """
    import torch

    torch.manual_seed(seed)
    settings = {"temperature": 1.0, "n": count}
    text = f"{image_text(KIND, 1)} {words(8, 6)}"
    return serve_requests(llm, [Request("draws", text, (3,), NUM_TOKENS, settings)])


def _prefixes(served: Served, length: int) -> list[Prefix]:
    return [tuple(one.token_ids[:length]) for one in served.results["draws"]]


# A two-sample test on token prefixes, and how large a difference it sees.

MIN_EXPECTED = 10
"""Prefixes with fewer expected occurrences per sample are pooled."""
MAX_POOLS = 4
"""Most cells that rare prefixes are spread over, by the sum of their tokens."""


def table(one: Sequence[Prefix], other: Sequence[Prefix]) -> np.ndarray:
    """Return counts [2, cells]: a cell for each frequent prefix, then the pools of the rare ones.

    Which pool a prefix falls into depends on the prefix alone, so two samples of one distribution
    fill the pools alike. Without them long prefixes, nearly all rare, would not be compared.
    """
    total = Counter(one) + Counter(other)
    frequent = {prefix for prefix, count in total.items() if count >= 2 * MIN_EXPECTED}
    num_rare = sum(count for prefix, count in total.items() if prefix not in frequent)
    pools = min(max(num_rare // (4 * MIN_EXPECTED), 1), MAX_POOLS)
    samples = [
        Counter(prefix if prefix in frequent else sum(prefix) % pools for prefix in sample)
        for sample in (one, other)
    ]
    return np.array([[sample[cell] for cell in samples[0] | samples[1]] for sample in samples])


def p_value(counts: np.ndarray) -> float:
    """Return the p-value of the G-test that both rows of [2, cells] have one distribution."""
    if counts.shape[1] == 1:
        return 1.0
    return float(chi2_contingency(counts, correction=False, lambda_="log-likelihood").pvalue)


def rejection_rate(prefixes: Sequence[Prefix], bias: float, repeats: int = 200) -> float:
    """Return how often the test rejects when the second sample comes from a biased sampler.

    Both samples are drawn with replacement from ``prefixes``. The biased sampler replaces the last
    token by the most likely one behind the same tokens with probability ``bias``, which is what a
    verifier does that lets this share of the drafts pass unseen.
    """
    rng, size = np.random.default_rng(0), len(prefixes)
    behind: dict[Prefix, Counter[int]] = {}
    for prefix in prefixes:
        behind.setdefault(prefix[:-1], Counter())[prefix[-1]] += 1
    favourites = {context: count.most_common(1)[0][0] for context, count in behind.items()}
    rejected = 0
    for _ in range(repeats):
        one = [prefixes[i] for i in rng.integers(size, size=size)]
        other = [prefixes[i] for i in rng.integers(size, size=size)]
        forced = rng.random(size) < bias
        other = [
            (*prefix[:-1], favourites[prefix[:-1]]) if force else prefix
            for prefix, force in zip(other, forced, strict=True)
        ]
        rejected += p_value(table(one, other)) < ALPHA
    return rejected / repeats

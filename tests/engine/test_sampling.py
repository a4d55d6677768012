"""At temperature 1, tokens have the distribution of plain sampling.

Two samples of ``DRAWS`` continuations of one prompt, drawn without speculation and with chains,
trees or single paths, are compared by a G-test over their first one, two and three tokens (rare
prefixes in a few pools). Tokens after the first come from the verification of drafts. Each test has
``ALPHA`` as its chance of a false alarm; the draws are seeded, so a result does not change from run
to run. Power: a verifier that lets a share ``BIAS`` of its decisions fall on the likeliest token is
found with a probability of at least 95 %, which ``test_power`` measures on simulated counts. Both
depend on the runner: V2 under the interpreter is slow.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine import two_sample
from tests.engine.sampling_jobs import soften
from tests.engine.setups import params
from tests.support.child import run_in_subprocess
from tests.support.runners import Runner
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
ALPHA = 0.001
DRAWS = {"v1": 4000, "v2": 400}
BIAS = {"v1": 0.15, "v2": 0.6}
NUM_TOKENS = 3
LOGIT_FACTOR = 0.7
"""Flattens the tiny target's distribution so that the likeliest token has well below 90 %."""

# Two levels, as many as there are tokens behind the first.
TREE = {"num_draft_tokens": 6, "tree": {"depth": 1, "top_k": 3}}
# Paths of one or two tokens, as sure as the draft is.
PATH = {
    "num_draft_tokens": 2,
    "tree": {"policy": "spec_llava", "depth": 1, "top_k": 1, "threshold": 0.99},
}
Sampled = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=params("v1", "v2", slow=["v1", "v2"]))
def sampled(
    request: pytest.FixtureRequest, tiny: TinyStore, tmp_path_factory: pytest.TempPathFactory
) -> Sampled:
    """Draws with and without speculation."""
    runner: Runner = request.param
    head = tiny.pair(KIND)[1]
    soft = soften(tiny.target(KIND), tmp_path_factory.mktemp("soft"), LOGIT_FACTOR)
    options = {
        "model": str(soft),
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
        "max_model_len": 256,
    }
    setups = [
        {"name": "plain", "options": options},
        {"name": "spec", "options": options | {"draft": head}},
    ]
    if runner.name == "v1":
        # V2's draws with trees are those of plain decoding, one by one: `test_tree_seeds`.
        for name, tree in (("tree", TREE), ("path", PATH)):
            setups.append({"name": name, "options": options | {"draft": head} | tree})
    kwargs = {"kind": KIND, "setups": setups, "count": DRAWS[runner.name], "num_tokens": NUM_TOKENS}
    items = run_in_subprocess("tests.engine.sampling_jobs:sample", kwargs, runner.env(), 1500)
    return {item["name"]: item | {"bias": BIAS[runner.name]} for item in items}


def _prefixes(sampled: Sampled, name: str, length: int) -> list[two_sample.Prefix]:
    return [tuple(tokens[:length]) for tokens in sampled[name]["tokens"]]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_same_distribution(sampled: Sampled, length: int) -> None:
    for drafts in set(sampled) - {"plain"}:
        counts = two_sample.table(*(_prefixes(sampled, name, length) for name in ("plain", drafts)))
        filled = (counts.sum(axis=0) >= 2 * two_sample.MIN_EXPECTED).sum()
        # The first token involves no draft, and one token takes nearly all of its probability.
        assert filled >= (1 if length == 1 else 3), (
            f"nothing to compare with {drafts}: the target is sure of its tokens"
        )
        assert two_sample.p_value(counts) > ALPHA, drafts


def test_drafts_took_part(sampled: Sampled) -> None:
    """Some drafts were accepted and some were not."""
    assert {"plain", "spec"} <= set(sampled)
    for drafts in set(sampled) - {"plain"}:
        share = sampled[drafts]["accepted"] / sampled[drafts]["drafted"]
        assert 0.01 < share < 0.98, drafts


@pytest.mark.parametrize("length", [2, 3])
def test_power(sampled: Sampled, length: int) -> None:
    """A biased sampler is found nearly always, an unbiased one hardly ever."""
    draws = _prefixes(sampled, "plain", length)
    assert two_sample.rejection_rate(draws, sampled["plain"]["bias"], ALPHA, repeats=200) >= 0.95
    assert two_sample.rejection_rate(draws, 0.0, ALPHA, repeats=200) <= 0.02

"""Trees of other policies, sizes and heads on V1: outputs are plain vLLM's, and drafts count."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.engine.setups import SMALL, Served, accepted, assert_same, mean_accepted, serve, setup
from tests.support.runners import RUNNERS
from tests.support.tiny_configs import VOCAB
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
LIMIT = 256
EAGLE2: Mapping[str, Any] = {"policy": "eagle2", "depth": 3, "top_k": 3}


@dataclass(frozen=True)
class Variant:
    """A tree, and what else is changed.

    Attributes:
        tree: The setting.
        nodes: Nodes without the root.
        head: Changes to the head.
        config: Further speculative settings.
        tokens: What may be drafted; empty: all tokens.
    """

    tree: Mapping[str, Any]
    nodes: int = 19
    head: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()

    def options(self, tiny: TinyStore, vocab: Path) -> dict[str, Any]:
        """Return the engine's options; ``vocab`` is where a list of tokens may be written."""
        target, head = tiny.pair(KIND, **self.head)
        config = {
            "method": "vispec",
            "model": head,
            "num_speculative_tokens": self.nodes,
            "tree": dict(self.tree),
            **self.config,
        }
        if self.tokens:
            vocab.write_text(json.dumps({"token_ids": self.tokens}))
            config["draft_vocab"] = str(vocab)
        extra = SMALL["extra"] | {"speculative_config": config}
        return dict(SMALL) | {"model": target, "draft": head, "extra": extra}


LOAD = {"num_speculative_tokens_per_batch_size": [[1, 2, 19], [3, 6, 7], [7, 10, 2], [11, 16, 0]]}
GATED = {"compressor": "select(prune:2,pool:4,text_only)", "num_q": 1, "dialect": "canonical"}
CONFIDENT: Mapping[str, Any] = {"policy": "spec_llava", "depth": 3, "top_k": 3, "threshold": 0.1}
PATH: Mapping[str, Any] = {"policy": "spec_llava", "depth": 5, "top_k": 1, "threshold": 0.9999}
VARIANTS: Mapping[str, Variant] = {
    "embeds": Variant(EAGLE2, head={"compress": False}),
    "gated": Variant(EAGLE2, head=GATED),
    "tokens": Variant(EAGLE2, tokens=tuple(token for token in range(VOCAB) if token % 3)),
    "spec_llava": Variant(CONFIDENT),
    "path": Variant(PATH, nodes=6),
    "entropy": Variant({"policy": "entropy", "depth": 5, "top_k": 3}),
    "load": Variant(EAGLE2, config=LOAD),
    "paths": Variant(dict(CONFIDENT) | {"threshold": 0.9999}, config=LOAD),
    # More slots are drafted into than there are nodes.
    "few": Variant(EAGLE2, nodes=5),
    "shallow": Variant({"policy": "eagle2", "depth": 1, "top_k": 3}, nodes=12),
}

# These are also asked about prompts near the longest sequence.
EDGE = ("few", "load", "path")


@pytest.fixture(scope="module")
def served(tiny: TinyStore, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Plain vLLM and every variant; prompts near the longest sequence for two of them."""
    mixed = {"count": 32}
    plain = dict(SMALL) | {"model": tiny.pair(KIND)[0]}
    lists = tmp_path_factory.mktemp("lists")
    setups = [
        setup("plain", KIND, plain, {"mixed": mixed, "edge": {}, "prefix": {}, "features": {}})
    ]
    for name, variant in VARIANTS.items():
        scenarios: dict[str, Any] = {"mixed": dict(mixed)}
        if name in EDGE:
            scenarios["edge"] = {}
        if name == "path":
            scenarios |= {"prefix": {}, "features": {}}
        setups.append(setup(name, KIND, variant.options(tiny, lists / f"{name}.json"), scenarios))
    return serve(RUNNERS["v1"], setups)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(served: Served, name: str) -> None:
    assert_same(served["plain", "mixed"], served[name, "mixed"])
    assert mean_accepted(served[name, "mixed"]) > 0.1


def _rounds(served: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return drafted and accepted tokens of every round."""
    return [
        (drafted, accepted)
        for rows in served["results"].values()
        for row in rows
        for drafted, accepted in zip(row["drafted"], row["accepted_draft"], strict=True)
    ]


def test_paths_end_where_the_draft_is_unsure(served: Served) -> None:
    """Rounds have drafts of many lengths, alone and where a schedule asks for few tokens."""
    alone, scheduled = _rounds(served["path", "mixed"]), _rounds(served["paths", "mixed"])
    assert {drafted for drafted, _ in alone} >= {1, 2, 3, 6}
    assert {drafted for drafted, _ in scheduled} >= {1, 2, 4}
    assert max(accepted for drafted, accepted in alone if drafted == 2) == 2


@pytest.mark.parametrize("scenario", ["prefix", "features"])
def test_single_paths_are_lossless(served: Served, scenario: str) -> None:
    """Behind prefix hits, and with penalties, logprobs, grammars and several answers."""
    assert_same(served["plain", scenario], served["path", scenario])


def test_load_shrinks_trees_to_chains(served: Served) -> None:
    """Rounds have as many nodes as the schedule says; two of them are a chain, and count."""
    rounds = _rounds(served["load", "mixed"])
    assert {drafted for drafted, _ in rounds} >= {2, 7, 19}
    assert max(accepted for drafted, accepted in rounds if drafted == 2) == 2


def test_depth_bounds_what_is_accepted(served: Served) -> None:
    """Two levels with a depth of one; deeper ones elsewhere."""
    found = {
        name: {n for rows in accepted(served[name, "mixed"]).values() for row in rows for n in row}
        for name in ("shallow", "embeds")
    }
    assert max(found["shallow"]) == 2
    assert max(found["embeds"]) > 2


@pytest.mark.parametrize("name", EDGE)
def test_near_the_longest_sequence(served: Served, name: str) -> None:
    """As many nodes as fit are verified, and some of them are accepted."""
    assert_same(served["plain", "edge"], served[name, "edge"])
    rounds = _rounds(served[name, "edge"])
    assert {drafted for drafted, _ in rounds} >= {1, 2, 3}
    assert sum(accepted for _, accepted in rounds) > 0

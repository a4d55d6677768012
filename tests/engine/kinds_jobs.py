"""Child-process job: heads of every kind, against plain decoding and against the PyTorch draft.

Tensor names end in their shape: L prompt tokens, D hidden, K draft steps, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.engine.acceptance_jobs import (
    SITUATIONS,
    Bench,
    Logits,
    compare_results,
    deep_requests,
    table_stats,
)
from tests.engine.spies import watch, watch_encoder
from tests.engine.workloads import (
    Request,
    Results,
    drive_one_by_one,
    image_text,
    mixed_requests,
    words,
)
from tests.support import draft_logits, engine

if TYPE_CHECKING:
    import torch
    from vllm import LLM

STEPS = 5
ROOMY: Mapping[str, Any] = {"max_num_batched_tokens": 256, "max_num_seqs": 8, "max_model_len": 256}
# Budgets that split prompts inside images, right before them and right behind them.
CHUNKS: Mapping[str, Any] = {**ROOMY, "max_num_batched_tokens": 24, "max_num_seqs": 3}
# 9 usable blocks of 32 tokens as well: requests preempt each other.
TIGHT: Mapping[str, Any] = {**CHUNKS, "max_num_seqs": 8, "num_blocks": 10}
SETUPS: Mapping[str, Mapping[str, Any]] = {"roomy": ROOMY, "chunks": CHUNKS, "tight": TIGHT}


def serve(
    kind: str,
    target: str,
    heads: dict[str, str],
    situations: list[str],
    chunk_situations: list[str] | None = None,
    count: int = 8,
    thorough: Mapping[str, Mapping[str, list[str]]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Serve the same requests plainly and with each head; yield what differs, head by head.

    ``thorough`` has, for some heads, situations by name of :data:`SETUPS` in place of the others'.
    """
    requests = [*mixed_requests(kind, count, 20, seed=3), picture(kind)]
    base: dict[str, Any] = {"model": target, "num_draft_tokens": STEPS}
    with engine.engine(engine.EngineOptions(**base, **ROOMY)) as llm:
        requests += at_borders(llm, kind) if chunk_situations or thorough else []
        requests += deep_requests(kind) if thorough else []
        plain = _ids(drive_one_by_one(llm, requests))
    for name, head in heads.items():
        usual = {"roomy": situations, "chunks": chunk_situations or []}
        setups = (thorough or {}).get(name, usual)
        yield {"head": name} | _one_head({**base, "draft": head}, setups, kind, requests, plain)


def picture(kind: str) -> Request:
    """Return the request whose first round is compared with the PyTorch draft."""
    image = image_text(kind, 1)
    return Request("picture", f"Look: {image} and {image} what do you see", (4, 5), 16)


def at_borders(llm: LLM, kind: str) -> list[Request]:
    """Return requests whose image begins one token before, at and after the first chunk's end.

    With the image right behind the chunk, the chunk's last row reads an embedding that the target
    itself needs in the next step only.
    """
    tokenizer, border = llm.get_tokenizer(), CHUNKS["max_num_batched_tokens"]
    image = tokenizer.encode(image_text(kind, 1), add_special_tokens=False)
    opening = len(image) - 2 if len(image) > 1 else 0
    return [
        Request(
            f"border-{start}",
            "",
            (3,),
            12,
            ids=(
                *_plain_ids(tokenizer, start, start - opening),
                *image,
                *_plain_ids(tokenizer, 5, 9),
            ),
        )
        for start in (border - 1, border, border + 1)
    ]


def _plain_ids(tokenizer: Any, seed: int, count: int) -> list[int]:
    ids: list[int] = tokenizer.encode(words(seed, 4 * count), add_special_tokens=False)
    return ids[:count]


def _one_head(
    options: Mapping[str, Any],
    setups: Mapping[str, list[str]],
    kind: str,
    requests: list[Request],
    plain: dict[str, list[int]],
) -> dict[str, Any]:
    found: dict[str, Any] = {"situations": {}}
    cold: tuple[Results, dict[str, Logits]] | None = None
    for name, situations in setups.items():
        if not situations:
            continue
        with engine.engine(engine.EngineOptions(**options, **SETUPS[name])) as llm:
            bench = Bench(llm, kind, requests)
            if cold is None:
                watched, encoded = watch_first_round(llm), watch_encoder(llm)
                cold = drive_one_by_one(llm, requests), bench.logits()
                found |= torch_gaps(options, watched["picture"], cold)
                found["model"] = type(draft_logits.drafter(llm).model).__name__
                found["encoded"] = sum(encoded), sum(len(set(r.images)) for r in requests)
                found["choices"] = choices(llm)
                found["cold_same"] = _ids(cold[0]) == plain
                found["accepted"] = {n: rows[0].accepted_draft for n, rows in cold[0].items()}
            for situation in situations:
                spy, before = watch(llm), table_stats(llm)
                results = SITUATIONS[situation](bench)
                found["situations"][f"{name}-{situation}"] = {
                    "same": _ids(results) == plain,
                    "requests": compare_results(*cold, results, bench.logits()),
                    "spy": spy.to_json(),
                    "table": {k: v - before[k] for k, v in table_stats(llm).items()},
                }
    return found


def choices(llm: LLM) -> dict[str, list[float]]:
    """Return what the gate, if the head has one, decided for each request it still knows."""
    rows, model = draft_logits.drafter(llm).draft_rows, draft_logits.drafter(llm).model.model
    if rows._choices is None:
        return {}
    known = rows._choices._choices.items()
    return {name.rsplit("-", 1)[0]: model.rows.query_code[index].tolist() for name, index in known}


def _ids(results: Results) -> dict[str, list[int]]:
    return {name: rows[0].token_ids for name, rows in results.items()}


def watch_first_round(llm: LLM) -> dict[str, dict[str, Any]]:
    """Keep what the target computed in each single, whole-prompt round (V1 and V2)."""
    rounds: dict[str, dict[str, Any]] = {}
    proposer, runner = draft_logits.drafter(llm), draft_logits.model_runner(llm)
    propose = proposer.propose

    def first(ids: list[str], token_ids: Any, hidden: Any, embeds: Any) -> None:
        name, length = ids[0].rsplit("-", 1)[0], len(token_ids)
        rounds.setdefault(
            name,
            {
                "token_ids": token_ids.tolist(),
                "hidden_LD": hidden[:length].clone(),
                "embeds_LD": embeds[:length].clone(),
            },
        )

    def v1(**kwargs: Any) -> Any:
        ids, tokens = runner.input_batch.req_ids, kwargs["target_token_ids"]
        first(ids, tokens, kwargs["target_hidden_states"], runner.inputs_embeds.gpu)
        return propose(**kwargs)

    def v2(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if input_batch.req_ids:
            tokens = input_batch.input_ids[: input_batch.num_tokens]
            hidden = kwargs["last_hidden_states"] if len(args) < 3 else args[2]
            embeds = runner.model_state.encoder_runner.inputs_embeds
            first(input_batch.req_ids, tokens, hidden, embeds)
        return propose(input_batch, *args, **kwargs)

    proposer.propose = v1 if hasattr(proposer, "set_inputs_first_pass") else v2
    return rounds


def torch_gaps(
    options: Mapping[str, Any], seen: dict[str, Any], cold: tuple[Results, dict[str, Logits]]
) -> dict[str, float]:
    """Return how far the engine's first chain is from the PyTorch draft's, relative to its size.

    ``blind_gap`` is the distance from a draft that reads nothing where the images are.
    """
    import json

    import torch
    from safetensors.torch import load_file

    from vllm_vispec.heads.folder import load_draft

    results, logits = cold
    folder = Path(options["model"])
    config = json.loads((folder / "config.json").read_text())
    image_id = config.get("image_token_id", config.get("image_token_index"))
    weights = load_file(folder / "model.safetensors")
    draft = load_draft(options["draft"])
    runs = image_runs(seen["token_ids"], image_id)
    blind_LD = seen["embeds_LD"].clone()
    for start, end in runs:
        blind_LD[start:end] = 0
    row = len(seen["token_ids"]) - 1
    own_KV = torch.stack([logits["picture"][row, step] for step in range(STEPS)])
    gaps = {}
    next_id = results["picture"][0].token_ids[0]
    for name, embeds_LD in (("torch_gap", seen["embeds_LD"]), ("blind_gap", blind_LD)):
        with torch.no_grad():
            given = seen | {"embeds_LD": embeds_LD}
            chain_KV = _chain(draft, given, next_id, runs, _lm_head(weights))
        gaps[name] = float((own_KV - chain_KV).abs().max() / chain_KV.abs().max())
    return gaps


def _chain(
    draft: Any,
    seen: dict[str, Any],
    next_id: int,
    runs: list[tuple[int, int]],
    lm_head: torch.Tensor,
) -> torch.Tensor:
    """Return the logits [K, V] of the PyTorch draft, a head's or a draft VLM's."""
    import torch

    if draft.config.is_draft_vlm:
        ids_L = torch.tensor(seen["token_ids"])
        own: torch.Tensor = draft.chain(
            draft.prefill(ids_L, seen["embeds_LD"], next_id, runs), STEPS
        ).logits_SV
        return own
    next_embed_D = draft.embed_tokens.weight[next_id]
    state = draft.prefill(seen["embeds_LD"], next_embed_D, seen["hidden_LD"], runs)
    shared: torch.Tensor = draft.chain(state, STEPS, lm_head).logits_SV
    return shared


def image_runs(token_ids: list[int], image_id: int) -> list[tuple[int, int]]:
    """Return the maximal stretches of image tokens as [start, end)."""
    runs: list[tuple[int, int]] = []
    for index, token in enumerate(token_ids):
        if token != image_id:
            continue
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs


def _lm_head(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(row for name, row in weights.items() if name.endswith("lm_head.weight"))

"""What is read from vLLM's Prometheus text, and what was counted between two readings."""

from __future__ import annotations

from dataclasses import replace

from vllm_vispec.bench.schema import MemoryFacts, SpecCounters

PREFIX = "vllm:spec_decode_num_"


def parse_counters(metrics: str) -> SpecCounters | None:
    """Read vLLM's Prometheus text; all engines of the server are added up."""
    from prometheus_client.parser import text_string_to_metric_families

    totals: dict[str, float] = {}
    positions: dict[int, float] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if not sample.name.startswith(PREFIX) or not sample.name.endswith("_total"):
                continue
            name = sample.name.removeprefix(PREFIX).removesuffix("_total")
            totals[name] = totals.get(name, 0) + sample.value
            if "position" in sample.labels:
                position = int(sample.labels["position"])
                positions[position] = positions.get(position, 0) + sample.value
    if "drafts" not in totals:
        return None
    return SpecCounters(
        rounds=int(totals["drafts"]),
        draft_tokens=int(totals["draft_tokens"]),
        accepted_tokens=int(totals["accepted_tokens"]),
        accepted_by_position=tuple(int(positions[index]) for index in sorted(positions)),
    )


def parse_kv_blocks(metrics: str) -> int | None:
    """Read the number of KV-cache blocks from vLLM's Prometheus text, if it is there."""
    from prometheus_client.parser import text_string_to_metric_families

    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            blocks = sample.labels.get("num_gpu_blocks", "")
            if sample.name == "vllm:cache_config_info" and blocks.isdigit():
                return int(blocks)
    return None


def difference(after: SpecCounters | None, before: SpecCounters | None) -> SpecCounters | None:
    """Return what was counted between two readings; None without speculation."""
    if after is None or before is None:
        return after
    return SpecCounters(
        rounds=after.rounds - before.rounds,
        draft_tokens=after.draft_tokens - before.draft_tokens,
        accepted_tokens=after.accepted_tokens - before.accepted_tokens,
        accepted_by_position=tuple(
            a - b
            for a, b in zip(after.accepted_by_position, before.accepted_by_position, strict=True)
        ),
    )


def lookups_between(after: MemoryFacts, before: MemoryFacts) -> MemoryFacts:
    """Return the later reading, image lookups counted from the earlier one on."""
    return replace(
        after,
        image_table_hits=_less(after.image_table_hits, before.image_table_hits),
        image_table_misses=_less(after.image_table_misses, before.image_table_misses),
    )


def _less(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before

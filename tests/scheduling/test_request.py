"""What one request may ask for, and where the setting `adaptive` has its effect."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams

from vllm_vispec.config import ViSpecConfig
from vllm_vispec.scheduling import patch_points, request
from vllm_vispec.scheduling.control import SCHEDULE, resolve_adaptive
from vllm_vispec.scheduling.request import check_request, goes_without_drafts, validate_params
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.errors import ViSpecError

K_SETTING = "num_speculative_tokens"


def asking(given: Any) -> Any:
    return SimpleNamespace(extra_args=None if given is None else {"vispec": given})


def serving(most: int, **settings: Any) -> Any:
    speculative = SimpleNamespace(
        num_speculative_tokens=most, num_speculative_tokens_per_batch_size=None
    )
    section = ViSpecConfig(**settings).to_section()
    return SimpleNamespace(speculative_config=speculative, additional_config=section)


@pytest.mark.parametrize(
    ("given", "limit"),
    [(None, None), ({K_SETTING: 0}, 0), ({K_SETTING: 3}, 3), (f'{{"{K_SETTING}": 2}}', 2)],
)
def test_both_forms(given: Any, limit: int | None) -> None:
    assert check_request(serving(5), asking(given)) == limit
    assert check_request(serving(5), None) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({K_SETTING: 6}, "=6 must be at most 5"),
        ({K_SETTING: -1}, "must be a whole number from 0 on"),
        ({K_SETTING: True}, "must be a whole number from 0 on"),
        ({}, "must be a whole number from 0 on"),
        ({"num_speculative_token": 1}, 'did you mean "num_speculative_tokens"?'),
        ({K_SETTING: 1, "temperature": 1}, "key 'temperature' is unknown: give"),
        ("{", "is not JSON: give"),
        pytest.param("[" * 100_000, "is not JSON: give", id="deep"),
        pytest.param("1" * 5000, "is not JSON: give", id="long"),
        ("3", "is no object: give"),
        ([1], "is no object: give"),
    ],
)
def test_what_cannot_be_is_one_line(given: Any, said: str) -> None:
    with pytest.raises(ViSpecError) as caught:
        check_request(serving(5), asking(given))
    assert said in str(caught.value)
    assert 'extra_args["vispec"]' in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "is_v2", "scheduler", "passes"),
    [
        ({"logit_bias": {7: 1.0}}, True, request.SCHEDULERS, True),
        ({"min_p": 0.1}, True, request.SCHEDULERS, True),
        ({"min_p": 0.1}, False, request.SCHEDULERS, False),
        ({"min_p": 0.1}, True, "mine.Scheduler", False),
        ({"min_p": 0.1, "trace_decode_token_ids": [1]}, True, request.SCHEDULERS, False),
        ({}, True, request.SCHEDULERS, False),
    ],
)
def test_what_vllm_refuses_with_drafts_is_checked_as_without(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    is_v2: bool,
    scheduler: str,
    passes: bool,
) -> None:
    monkeypatch.setattr(request, "uses_vispec", lambda config: True)
    config = serving(5)
    config.use_v2_model_runner = is_v2
    config.scheduler_config = SimpleNamespace(scheduler_cls=scheduler)
    processor = SimpleNamespace(vllm_config=config, speculative_config="drafts")
    params = SamplingParams(**changes)
    found = validate_params(lambda ours, params: ours.speculative_config, processor, params)
    assert found == (None if passes else "drafts")
    assert processor.speculative_config == "drafts"
    assert goes_without_drafts(config, params) is (is_v2 and bool(changes))
    assert not goes_without_drafts(config, None)


def test_trees_are_drafted_whole_or_not_at_all() -> None:
    engine = serving(29, tree=TreeSettings())
    for limit in (0, 29):
        check_request(engine, asking({K_SETTING: limit}))
    with pytest.raises(ViSpecError, match="must be 0 or 29"):
        check_request(engine, asking({K_SETTING: 3}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"settings": {SCHEDULE: [[1, 8, 2]]}}, SCHEDULE),
        ({"settings": {"enable_adaptive_verification": True}}, "enable_adaptive_verification"),
        ({"tree": TreeSettings()}, None),
        ({"tree": TreeSettings(policy="spec_llava", top_k=1)}, "a tree of a single path"),
        ({"tree": TreeSettings(depth=4)}, "a tree of a single path"),
        ({"ranks": 2}, "data_parallel_size"),
        ({"scheduler": "mine.Scheduler"}, "scheduler_cls"),
    ],
)
@pytest.mark.parametrize("adaptive", [None, True, False])
def test_it_follows_the_load_unless_something_else_decides(
    adaptive: bool | None, changes: dict[str, Any], reason: str | None
) -> None:
    settings = {K_SETTING: 5, **changes.get("settings", {})}
    given = settings.get(SCHEDULE)
    args = SimpleNamespace(scheduler_cls=changes.get("scheduler"), max_num_seqs=None)
    parallel = SimpleNamespace(data_parallel_size=changes.get("ranks", 1))
    tree = changes.get("tree")
    if adaptive and reason:
        with pytest.raises(ViSpecError, match=f"adaptive=true does not go with {reason}"):
            resolve_adaptive(adaptive, settings, args, parallel, tree)
        return
    found = resolve_adaptive(adaptive, settings, args, parallel, tree)
    by_default = reason is None and tree is None
    assert found is (by_default if adaptive is None else adaptive)
    assert (settings.get(SCHEDULE) != given) is found


@pytest.mark.parametrize("given", [None, "mine.Scheduler"])
def test_a_scheduler_of_the_users_stays_and_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    told: list[str] = []
    monkeypatch.setattr(patch_points, "patch", lambda *_: None)
    monkeypatch.setattr(
        patch_points.logger, "warning", lambda text, *args: told.append(text % args)
    )
    scheduler = SimpleNamespace(scheduler_cls=given, async_scheduling=True)
    for _ in range(2):  # ours is not taken for the user's
        patch_points.install(SimpleNamespace(scheduler_config=scheduler))
    ours = "vllm_vispec.scheduling.scheduler.ViSpecAsyncScheduler"
    assert scheduler.scheduler_cls == (given or ours)
    assert bool(told) == (given is not None)
    assert all("scheduler_cls=mine.Scheduler is not ours" in line for line in told)


@pytest.mark.parametrize(
    ("changes", "goes"),
    [
        ({"logit_bias": dict.fromkeys(range(1024), 1.0)}, True),
        # V2's sampler raises at more, which ends the engine.
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, False),
        ({"min_p": 1e-6}, False),
    ],
    ids=["as many biases as fit", "more", "what vLLM takes with drafts"],
)
def test_only_what_vllm_can_serve_goes_without_drafts(changes: dict[str, Any], goes: bool) -> None:
    engine = SimpleNamespace(use_v2_model_runner=True)
    assert goes_without_drafts(engine, SamplingParams(**changes)) is goes


def test_bounds_are_vllms() -> None:
    from vllm.sampling_params import _SAMPLING_EPS
    from vllm.v1.worker.gpu.sample.logit_bias import MAX_NUM_LOGIT_BIAS_TOKENS

    assert (request._LEAST_MIN_P, request._MOST_BIASES) == (
        _SAMPLING_EPS,
        MAX_NUM_LOGIT_BIAS_TOKENS,
    )

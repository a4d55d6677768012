"""vLLM's schedulers, with K chosen by `DraftControl` and cut by what a request asks for.

Installed through vLLM's ``scheduler_cls``.  A step's K is ``num_spec_tokens_to_schedule``; which
draft tokens of a request are verified is ``Request.spec_token_ids``.  Both runners follow these.

*Asleep.*  At K = 0 vLLM runs the draft's first pass on, so that its cache has no holes.  Once K was
0 for `SLEEP_AFTER` steps that is left out, too, in steps without a prompt.  Requests of such steps
have a gap in the draft's cache and get no draft tokens until they end or begin anew.  Both sides
count: the scheduler to know these requests, the worker (`Sleep`) to leave out the pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_vispec.config import ViSpecConfig
from vllm_vispec.scheduling.control import DraftControl, Sleep, ladder
from vllm_vispec.scheduling.request import check_request, goes_without_drafts
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)


class ViSpecScheduler(Scheduler):
    """Chooses K and gives each request as many draft tokens as it wants."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock = time.perf_counter
        self.control: DraftControl | None = None
        config = ViSpecConfig.from_vllm(self.vllm_config)
        if config.adaptive and self.dynamic_sd_lookup:
            mode = self.vllm_config.compilation_config.cudagraph_mode
            has_graphs = mode is not None and mode != CUDAGraphMode.NONE
            recorded = self.dynamic_sd_lookup[1:]
            choices = recorded if has_graphs else ladder(self.num_spec_tokens, config.tree)
            self.control = DraftControl(choices, config.tree)
        self._sleep = Sleep()
        # What requests asked for, and those with a gap in the draft's cache.
        self._limits: dict[str, int] = {}
        self._gaps: set[str] = set()
        # K and end of the last step, if the next one follows at once.
        self._last_step: tuple[int, float] | None = None

    def add_request(self, request: Any) -> None:
        """Note how many draft tokens the request wants.

        Front processes refuse what cannot be.  One that did not build the configuration itself
        (Ray Serve's, on GPUs) does not: an error here would end the engine.
        """
        limit = None
        try:
            limit = check_request(self.vllm_config, request.sampling_params)
        except ViSpecError as error:
            logger.warning(
                "ViSpec: request %s is drafted for as any: %s", request.request_id, error
            )
        if goes_without_drafts(self.vllm_config, request.sampling_params):
            limit = 0
            _note_no_drafts()
        if limit is not None:
            self._limits[request.request_id] = limit
        super().add_request(request)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Choose K for the drafts of this step, and forget who is gone."""
        for request_id in scheduler_output.finished_req_ids:
            self._limits.pop(request_id, None)
            self._gaps.discard(request_id)
        # Their draft reads everything anew. For V2 vLLM calls resumed requests new ones.
        self._gaps -= scheduler_output.scheduled_cached_reqs.resumed_req_ids
        self._gaps.difference_update(one.req_id for one in scheduler_output.scheduled_new_reqs)
        if self.control is not None and scheduler_output.num_scheduled_tokens:
            scheduler_output.num_spec_tokens_to_schedule = self._choose(scheduler_output)
        super()._update_after_schedule(scheduler_output)
        self._cut(scheduler_output.num_scheduled_tokens)

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """Cut the draft tokens that the worker returned; not with asynchronous scheduling."""
        super().update_draft_token_ids(draft_token_ids)
        self._cut(draft_token_ids.req_ids)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> Any:
        """Count what was accepted; vLLM calls this for every request with draft tokens."""
        if self.control is not None:
            invalid = (num_invalid_spec_tokens or {}).get(request_id, 0)
            self.control.saw_draft(num_draft_tokens - invalid, num_accepted_tokens)
        return super().make_spec_decoding_stats(
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any) -> Any:
        """Time the step, if no prompt is in it and the one before it drafted as many tokens."""
        found = super().update_from_output(scheduler_output, *args)
        if self.control is not None and scheduler_output.num_scheduled_tokens:
            self._time(scheduler_output, self.control)
        return found

    def _choose(self, output: SchedulerOutput) -> int:
        assert self.control is not None
        ids = output.num_scheduled_tokens
        wanted = [self._wanted(i) for i in ids] if self._limits or self._gaps else None
        most = self.num_spec_tokens if wanted is None else max(wanted)
        if not self.scheduler_config.async_scheduling and self._are_prompts(ids):
            # The first tokens do not wait for drafts: vLLM returns them behind these.
            most = 0
        drafting = len(ids) if wanted is None else sum(count > 0 for count in wanted)
        # Asked in every step, so that pauses pass while nothing can be drafted.
        k = self.control.choose(len(ids), drafting if most else 0)
        k = max(choice for choice in self.control.choices if choice <= min(k, most))
        if self._sleep.saw(k, output.total_num_scheduled_tokens == len(ids)):
            self._gaps.update(ids)
        if line := self.control.news(len(ids)):
            logger.info("ViSpec: %s", line)
        return k

    def _are_prompts(self, request_ids: Iterable[str]) -> bool:
        return all(self.requests[one].num_output_tokens == 0 for one in request_ids)

    def _wanted(self, request_id: str) -> int:
        if request_id in self._gaps:
            return 0
        return self._limits.get(request_id, int(self.num_spec_tokens))

    def _cut(self, request_ids: Iterable[str]) -> None:
        if not self._limits and not self._gaps:
            return
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is not None and request.spec_token_ids:
                request.spec_token_ids = request.spec_token_ids[: self._wanted(request_id)]

    def _time(self, output: SchedulerOutput, control: DraftControl) -> None:
        now, k = self.clock(), output.num_spec_tokens_to_schedule
        batch, drafts = len(output.num_scheduled_tokens), output.scheduled_spec_decode_tokens
        # One token each beside the drafts, and drafts for all requests or for none.
        without_drafts = output.total_num_scheduled_tokens - sum(map(len, drafts.values()))
        is_decoding = without_drafts == batch and len(drafts) == (batch if k else 0)
        if self._last_step is not None and self._last_step[0] == k and is_decoding:
            control.saw_step(k, batch, now - self._last_step[1])
        # Behind it the engine waits for requests.
        self._last_step = (k, now) if self.has_unfinished_requests() else None


class ViSpecAsyncScheduler(ViSpecScheduler, AsyncScheduler):
    """The same over vLLM's asynchronous scheduler."""


@lru_cache
def _note_no_drafts() -> None:
    logger.info("ViSpec: requests with logit_bias or min_p are served without drafts")

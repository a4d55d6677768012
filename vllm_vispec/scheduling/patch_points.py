"""What K by load, acceptance and request relies on in vLLM."""

from typing import Any

from vllm_vispec.compat.patch_point import PatchGroup, subclasses, wraps
from vllm_vispec.compat.patching import patch
from vllm_vispec.config import uses_vispec
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

SCHEDULING = PatchGroup(
    name="scheduling",
    feature="ViSpec",
    remedy="",
    is_needed=uses_vispec,
    points=(
        subclasses(
            "vllm.v1.core.sched.scheduler:Scheduler"
            "{add_request(request), _update_after_schedule(scheduler_output), "
            "update_draft_token_ids(draft_token_ids), "
            "update_from_output(scheduler_output, model_runner_output), "
            "make_spec_decoding_stats(spec_decoding_stats, num_draft_tokens, "
            "num_accepted_tokens, num_invalid_spec_tokens, request_id), "
            "self.dynamic_sd_lookup, self.num_spec_tokens, self.requests}",
            "K of every step, by load and acceptance; how many draft tokens a request gets",
        ),
        wraps(
            "vllm.v1.engine.input_processor:InputProcessor"
            "{_validate_params(params, supported_tasks), self.speculative_config}",
            "refuses what a request asks for in vain, and lets through what is served without "
            "drafts; only in engines with a ViSpec head",
        ),
    ),
)


def install(vllm_config: Any) -> None:
    """Let an engine schedule with our class, and check what its requests ask for.

    A scheduler that the user chose stays.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_vispec.scheduling import request

    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is None:
        kind = "ViSpecAsyncScheduler" if scheduler.async_scheduling else "ViSpecScheduler"
        scheduler.scheduler_cls = f"{request.SCHEDULERS}.{kind}"
        logger.info("ViSpec sets scheduler_cls=%s; vLLM warns of that", scheduler.scheduler_cls)
    elif not request.is_ours(scheduler.scheduler_cls):
        logger.warning(
            "ViSpec: scheduler_cls=%s is not ours: a request's own num_speculative_tokens has no "
            "effect; leave it out to let requests choose",
            scheduler.scheduler_cls,
        )
    patch(InputProcessor, "_validate_params", request.validate_params)


GROUPS = (SCHEDULING,)

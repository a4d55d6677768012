"""How many draft tokens one request gets: ``extra_args["vispec"]`` of its sampling parameters.

OpenAI clients send it as ``vllm_xargs``, whose values vLLM allows to be texts, numbers or lists: so
it may also be given as the JSON text of the same object.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

from vllm_vispec.config import SECTION, uses_vispec
from vllm_vispec.trees.limits import has_branches
from vllm_vispec.utils.errors import ViSpecError, did_you_mean

K_SETTING = "num_speculative_tokens"
SCHEDULERS = "vllm_vispec.scheduling.scheduler"
"""Module of the schedulers that know what requests ask for."""
_LEAST_MIN_P, _MOST_BIASES = 1e-5, 1024
"""vLLM's ``_SAMPLING_EPS`` and ``MAX_NUM_LOGIT_BIAS_TOKENS``."""
_FORM = f'give {{"{K_SETTING}": N}}, as an object or as its JSON text'


def request_limit(params: Any) -> int | None:
    """Return the most draft tokens that a request wants in a step, None if it does not say.

    Args:
        params: vLLM's `SamplingParams`; None for requests that sample nothing.

    Raises:
        ViSpecError: Names what is wrong and the form that is wanted.
    """
    given = (getattr(params, "extra_args", None) or {}).get(SECTION)
    if given is None:
        return None
    shown, content = f'extra_args["{SECTION}"]={given!r:.80}', given
    if isinstance(given, str):
        try:
            content = json.loads(given)
        # Not only `JSONDecodeError`: also numbers that are too long, and objects too deep.
        except (ValueError, RecursionError):
            raise ViSpecError(f"{shown} is not JSON: {_FORM}") from None
    if not isinstance(content, Mapping):
        raise ViSpecError(f"{shown} is no object: {_FORM}")
    for name in content.keys() - {K_SETTING}:
        hint = did_you_mean(name, [K_SETTING]) or f": {_FORM}"
        raise ViSpecError(f"{shown}: key {name!r} is unknown{hint}")
    limit = content.get(K_SETTING)
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
        raise ViSpecError(f"{shown}: {K_SETTING} must be a whole number from 0 on: {_FORM}")
    return limit


def check_request(vllm_config: Any, params: Any) -> int | None:
    """Return what `request_limit` does, checked against what the engine drafts.

    Raises:
        ViSpecError: Names the value and those that are allowed.
    """
    limit = request_limit(params)
    if limit is None:
        return None
    most = vllm_config.speculative_config.num_speculative_tokens
    if has_branches(vllm_config) and limit not in (0, most):
        raise ViSpecError(
            f'extra_args["{SECTION}"]: {K_SETTING}={limit} must be 0 or {most}, since this server '
            "drafts trees, whole or not at all"
        )
    if limit > most:
        raise ViSpecError(
            f'extra_args["{SECTION}"]: {K_SETTING}={limit} must be at most {most}, which is what '
            "this server drafts"
        )
    return limit


def is_ours(scheduler_cls: Any) -> bool:
    """Whether vLLM's ``scheduler_cls`` is a scheduler that knows what requests ask for."""
    return str(scheduler_cls).startswith(SCHEDULERS)


def goes_without_drafts(vllm_config: Any, params: Any) -> bool:
    """Whether vLLM refuses what a request asks for together with drafts, and serves it without.

    V2's sampler knows these parameters; with any speculation V1 loads nothing that does.  At more
    biases than it has room for it raises, which ends the engine: those vLLM goes on refusing.
    """
    biases = len(getattr(params, "logit_bias", None) or ())
    asks = biases or (getattr(params, "min_p", None) or 0.0) > _LEAST_MIN_P
    return bool(asks and biases <= _MOST_BIASES and vllm_config.use_v2_model_runner)


def validate_params(
    original: Callable[..., Any], processor: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    """Stands for ``InputProcessor._validate_params``; takes what can be served without drafts.

    Raises:
        VLLMValidationError: What servers answer with status 400; to other errors it is 500.
    """
    from vllm.exceptions import VLLMValidationError

    config = processor.vllm_config
    if not uses_vispec(config):
        return original(processor, params, *args, **kwargs)
    try:
        check_request(config, params)
    except ViSpecError as error:
        raise VLLMValidationError(str(error)) from None
    knows_limits = is_ours(config.scheduler_config.scheduler_cls)
    if knows_limits and goes_without_drafts(config, params) and not params.trace_decode_token_ids:
        # vLLM looks at nothing else of speculation; `ViSpecScheduler` gives the request no drafts.
        processor = copy(processor)
        processor.speculative_config = None
    return original(processor, params, *args, **kwargs)

"""The child process of `vispec verify`: one engine that answers, or one attention backend."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from vllm_vispec.compat.check import require
from vllm_vispec.compat.groups import groups_named
from vllm_vispec.plugin import register
from vllm_vispec.utils.errors import ViSpecError, first_line
from vllm_vispec.utils.process import serve_requests
from vllm_vispec.verify.prompts import PROMPTS
from vllm_vispec.verify.result import Acceptance, Answer, AttentionCase, AttentionError

EXTENSION = "vllm_vispec.verify.worker_extension.VerifyWorker"
TOP = 20
"""Logprobs that are kept; vLLM's default limit."""

Request = Mapping[str, Any]


class Worker:
    """What the process has started."""

    llm: Any = None
    vllm_config: Any = None

    def start(self, request: Request) -> dict[str, Any]:
        """Start an engine with keyword arguments of `vllm.LLM`; return its state."""
        from vllm import LLM

        self.llm = LLM(**request["engine"], worker_extension_cls=EXTENSION, disable_log_stats=False)
        state = self.llm.collective_rpc("vispec_state")[0]
        runner = state["runner"].lower()
        for group in (*groups_named("profile", runner), *groups_named("verify", runner)):
            require(group)
        return {"state": state}

    def ask(self, request: Request) -> dict[str, Any]:
        """Answer prompts, by their places, together and greedily."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0,
            max_tokens=request["max_tokens"],
            logprobs=TOP if request["logprobs"] else None,
        )
        messages = [PROMPTS[place].messages() for place in request["prompts"]]
        outputs = self.llm.chat(messages, params, use_tqdm=False)
        return {"answers": [_answer(output.outputs[0]).to_json() for output in outputs]}

    def acceptance(self, _: Request) -> dict[str, Any]:
        """Return vLLM's counters."""
        metrics = {
            one.name.removeprefix("vllm:spec_decode_"): one for one in self.llm.get_metrics()
        }
        names = "num_drafts", "num_draft_tokens", "num_accepted_tokens"
        found = Acceptance(
            **{name: metrics[name].value for name in names},
            num_accepted_tokens_per_pos=tuple(metrics["num_accepted_tokens_per_pos"].values),
        )
        return {"acceptance": found.to_json()}

    def watch(self, _: Request) -> dict[str, Any]:
        """Time what follows."""
        self.llm.collective_rpc("vispec_watch")
        return {}

    def timings(self, request: Request) -> dict[str, Any]:
        """Return medians."""
        found = self.llm.collective_rpc("vispec_timings", args=(request["num_draft_passes"],))
        return {"timings": found[0]}

    def configure(self, request: Request) -> dict[str, Any]:
        """Make the configuration of an engine without starting it."""
        import torch
        from vllm.engine.arg_utils import EngineArgs

        if torch.cpu._is_amx_tile_supported():
            # In an engine the model's products ask the kernel for these registers first.
            torch.cpu._init_amx()
        self.vllm_config = EngineArgs(**request["engine"]).create_engine_config()
        return {}

    def attention(self, request: Request) -> dict[str, Any]:
        """Check one backend; what it raises is its failure."""
        from vllm_vispec.verify.attention import check_attention

        case = AttentionCase.from_json(request["case"])
        try:
            found = check_attention(self.vllm_config, case, request["backend"])
        except Exception as error:
            traceback.print_exc()
            found = AttentionError(case, request["backend"], failure=first_line(error))
        return {"attention": found.to_json()}

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request says; an error becomes its one line."""
        actions = (
            *(self.start, self.ask, self.acceptance, self.watch),
            *(self.timings, self.configure, self.attention),
        )
        try:
            return next(one for one in actions if one.__name__ == request["do"])(request)
        except Exception as error:
            traceback.print_exc()
            return {"error": first_line(error), "is_refusal": isinstance(error, ViSpecError)}


def _answer(output: Any) -> Answer:
    top = ({token: one.logprob for token, one in row.items()} for row in output.logprobs or ())
    return Answer(tuple(output.token_ids), tuple(top))


def main() -> None:
    """Answer until stdin ends."""
    register()
    worker = Worker()
    serve_requests(worker.reply)
    if worker.llm is not None:
        worker.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()

"""What a user is told where ViSpec cannot work with the installed vLLM at all.

Imports nothing of vLLM's, which may be what is broken.
"""

from dataclasses import dataclass
from typing import Any

from vllm_vispec.spec_decode.options import METHOD, settings_of
from vllm_vispec.utils.errors import ViSpecError


@dataclass(frozen=True)
class Refusal:
    """Stands for ``EngineArgs.create_speculative_config``.

    Attributes:
        problem: What `"method": "vispec"` fails with; everything else is vLLM's.
    """

    problem: str

    def __call__(self, original: Any, args: Any, *call_args: Any, **kwargs: Any) -> Any:
        """Refuse our method."""
        if settings_of(args).get("method") == METHOD:
            raise ViSpecError(self.problem)
        return original(args, *call_args, **kwargs)

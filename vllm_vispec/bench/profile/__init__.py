"""Where a round's time goes: vLLM's own EAGLE and ViSpec, part by part, side by side."""

from vllm_vispec.bench.profile.result import Profile
from vllm_vispec.bench.profile.run import run_profile
from vllm_vispec.bench.profile.settings import ProfileSettings, default_runner
from vllm_vispec.bench.profile.tables import print_profile

__all__ = ["Profile", "ProfileSettings", "default_runner", "print_profile", "run_profile"]

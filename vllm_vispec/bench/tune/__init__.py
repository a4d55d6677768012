"""`vispec bench tune`: which K at which load, from measurements."""

from vllm_vispec.bench.tune.choose import FLOOR, Gain, choose
from vllm_vispec.bench.tune.gains import Gains, gains_of
from vllm_vispec.bench.tune.result import TUNE_FILE, Tuning, Verdict
from vllm_vispec.bench.tune.verify import verdicts, verify_folder, verify_settings

__all__ = [
    "FLOOR",
    "TUNE_FILE",
    "Gain",
    "Gains",
    "Tuning",
    "Verdict",
    "choose",
    "gains_of",
    "verdicts",
    "verify_folder",
    "verify_settings",
]

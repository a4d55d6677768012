"""What speedup to expect, from sizes and rates: a roofline per pass. Its results are estimates.

`roofline` has the formulas, `shapes` reads the sizes out of config.json files, `devices` knows
public figures, `request` turns a user's settings into a table, `measured` reads measured cells,
`calibrate` fits the rates to them and says how far off the model is.
"""

from vllm_vispec.bench.estimate.calibrate import Calibration, calibrate
from vllm_vispec.bench.estimate.devices import DEVICES, Device, get_device
from vllm_vispec.bench.estimate.measured import (
    MeasuredCell,
    hold_out,
    measured_cells,
    read_measured,
)
from vllm_vispec.bench.estimate.request import EstimateOptions, EstimateTable, estimate
from vllm_vispec.bench.estimate.roofline import (
    Acceptance,
    Hardware,
    PassShape,
    Prediction,
    Workload,
    predict,
)
from vllm_vispec.bench.estimate.schedule import best_schedule
from vllm_vispec.bench.estimate.shapes import draft_shape, explicit_shape, target_shape

__all__ = [
    "DEVICES",
    "Acceptance",
    "Calibration",
    "Device",
    "EstimateOptions",
    "EstimateTable",
    "Hardware",
    "MeasuredCell",
    "PassShape",
    "Prediction",
    "Workload",
    "best_schedule",
    "calibrate",
    "draft_shape",
    "estimate",
    "explicit_shape",
    "get_device",
    "hold_out",
    "measured_cells",
    "predict",
    "read_measured",
    "target_shape",
]

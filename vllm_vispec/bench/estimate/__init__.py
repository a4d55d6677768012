"""What speedup to expect, from sizes and rates: a roofline per pass. Its results are estimates.

`roofline` has the formulas, `shapes` reads the sizes out of config.json files, `devices` knows
public figures, `request` turns a user's settings into a table, `calibrate` fits the rates to
measured cells and says how far off the model is.
"""

from vllm_vispec.bench.estimate.calibrate import (
    Calibration,
    MeasuredCell,
    calibrate,
    measured_cells,
)
from vllm_vispec.bench.estimate.devices import DEVICES, Device, get_device
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
    "measured_cells",
    "predict",
    "target_shape",
]

"""The registry of patch groups, a module of each feature, and what an engine needs of them.

The only module of `compat` that imports the rooms of features.
"""

from importlib.util import find_spec
from typing import Any

from vllm_vispec.bench import patch_points as bench
from vllm_vispec.compat.check import require
from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint, Runner
from vllm_vispec.compressors import patch_points as compressors
from vllm_vispec.draft_model import patch_points as draft_model
from vllm_vispec.draft_vlm import patch_points as draft_vlm
from vllm_vispec.draft_vocab import patch_points as draft_vocab
from vllm_vispec.heads import patch_points as heads
from vllm_vispec.models import patch_points as models
from vllm_vispec.scheduling import patch_points as scheduling
from vllm_vispec.spec_decode import patch_points as spec_decode
from vllm_vispec.trees import patch_points as trees
from vllm_vispec.utils.errors import ViSpecError

V1_FOLDER = "vllm_vispec.v1"


def _v1_groups() -> tuple[PatchGroup, ...]:
    """Those of the V1 model runner, as long as its folder is there."""
    if find_spec(V1_FOLDER) is None:
        return ()
    from vllm_vispec.v1 import patch_points

    return patch_points.GROUPS


GROUPS: tuple[PatchGroup, ...] = (
    *spec_decode.GROUPS,
    *scheduling.GROUPS,
    *models.GROUPS,
    *compressors.GROUPS,
    *draft_vlm.GROUPS,
    *draft_model.GROUPS,
    *draft_vocab.GROUPS,
    *trees.GROUPS,
    *heads.GROUPS,
    *_v1_groups(),
    *bench.GROUPS,
)
"""All groups, in the order in which `vispec doctor` prints them."""


def unique_points() -> list[PatchPoint]:
    """Return the patch points of all groups, each once."""
    return list({point.name: point for group in GROUPS for point in group.points}.values())


def groups_named(name: str, runner: Runner | None = None) -> list[PatchGroup]:
    """Return a feature's groups, those of one model runner and those of both."""
    return [g for g in GROUPS if g.name == name and (runner is None or g.runner in (None, runner))]


def runner_of(vllm_config: Any) -> Runner:
    """Return the model runner that vLLM takes."""
    return "v2" if vllm_config.use_v2_model_runner else "v1"


def needed_groups(vllm_config: Any, runner: Runner) -> list[PatchGroup]:
    """Return the groups without which an engine with a ViSpec head cannot run as configured."""
    mine = (group for group in GROUPS if group.runner in (None, runner))
    return [group for group in mine if group.is_needed(vllm_config)]


def check_features(vllm_config: Any) -> list[PatchGroup]:
    """Check and return the patch groups of everything that an engine with a ViSpec head uses.

    Raises:
        ViSpecError: names the first feature that cannot be used, the patch point and the remedy.
    """
    runner = runner_of(vllm_config)
    groups = needed_groups(vllm_config, runner)
    if not any(group.runner == runner for group in groups):
        raise ViSpecError(
            f"this vllm-vispec has no {runner.upper()} model runner: use the other one "
            f"(VLLM_USE_V2_MODEL_RUNNER={int(runner == 'v1')})"
        )
    for group in groups:
        require(group)
    return groups

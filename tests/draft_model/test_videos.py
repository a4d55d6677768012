"""Videos in a prompt: the draft has the target's positions, and features of its own tower."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING, Any

import pytest

from tests.draft_model.test_pairs import assert_says, draft
from tests.support.engine import Engine
from tests.support.tiny_models import random_image
from tests.support.tiny_store import TinyStore
from tests.support.workloads import Request, image_text, words

if TYPE_CHECKING:
    import numpy as np
    import torch

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 72, "max_model_len": 512}
VIDEO = 2
"""Of transformers, the kind of a video's tokens."""
FILM = {"fps": 2.0, "duration": 2.0, "total_num_frames": 4, "frames_indices": list(range(4))}
FILM |= {"video_backend": "opencv"}


class Film(Request):
    """A request with a video of four frames, two a second, before its images."""

    def frames(self) -> np.ndarray[Any, Any]:
        """Return the frames, uint8 ``[4, 56, 84, 3]``."""
        import numpy as np

        return np.stack([np.asarray(random_image(50 + i, (84, 56))) for i in range(4)])

    def prompt(self) -> dict[str, Any]:
        """Return the prompt for vLLM."""
        prompt = super().prompt()
        film = FILM | {"do_sample_frames": False}
        prompt.setdefault("multi_modal_data", {})["video"] = [(self.frames(), film)]
        return prompt


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_videos_have_the_targets_positions(
    engine: Callable[..., Engine], tiny: TinyStore, kind: str
) -> None:
    sibling = tiny.sibling(kind)
    drafting = engine("v1", kind=kind, draft=sibling, num_draft_tokens=3, **OPTIONS)
    video = image_text(kind, 1).replace("image_pad", "video_pad")
    requests = [
        Film("video", f"{words(5, 4)} {video} {words(6, 5)}", (), 9),
        Film("both", f"{video} {words(7, 3)} {image_text(kind, 1)} {words(8, 4)}", (3,), 9),
    ]
    for request, drafted in zip(requests, drafting.run(draft, requests)[0], strict=True):
        given = {"videos": [request.frames()], "video_metadata": [FILM], "do_sample_frames": False}
        assert_says(sibling, request, drafted, positions=_positions_in_vllm, **given)


def _positions_in_vllm(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Return rotary positions ``[3, 1, T]``: text goes on behind the last moment of a video.

    In transformers it goes on behind its height and width.
    """
    asked = signature(model.model.get_rope_index).parameters.keys() & inputs.keys()
    positions, _ = model.model.get_rope_index(**{name: inputs[name] for name in asked})
    (kinds,) = inputs["mm_token_type_ids"].tolist()
    for row in range(1, len(kinds)):
        if kinds[row - 1 : row + 1] == [VIDEO, 0]:
            positions[:, 0, row:] += positions[:, 0, :row].max() + 1 - positions[0, 0, row]
    found: torch.Tensor = positions
    return found

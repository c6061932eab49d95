"""What `moesim calibrate` and `moesim validate` share: shapes, ranks, and starting them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from typing import TYPE_CHECKING

from moesim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moesim.replay.shape import ExpertShape

REPLAYED_DTYPE = "bf16"


def require_torch() -> None:
    """Raise InputError where torch is not installed, without importing it."""
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "replaying on this machine needs torch, which is not installed",
            "pip install 'moesim[torch]', or a build of torch for your GPUs",
        )


def shape_of(model: str, notify: Callable[[str], None]) -> ExpertShape:
    """The replayed shape of a preset, a config.json, or a shape given as JSON.

    Experts stored in another type than bf16 are replayed as bf16, with a notice.
    """
    from moesim.model.names import load_model
    from moesim.replay.shape import ExpertShape, load_shape

    if model.lstrip().startswith("{"):
        return load_shape(model)
    spec = load_model(model)
    if spec.expert_dtype not in (REPLAYED_DTYPE, "fp16"):
        notify(f"{spec.name} stores experts as {spec.expert_dtype}; replayed as {REPLAYED_DTYPE}")
    return ExpertShape(
        spec.name,
        spec.expert_hidden,
        spec.moe_intermediate_size,
        spec.num_experts,
        spec.top_k,
        REPLAYED_DTYPE,
    )


def count_gpus() -> int:
    """GPUs that nvidia-smi lists, 0 where there is none; torch stays unimported."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def shape_arguments(shapes: Sequence[ExpertShape]) -> list[str]:
    """`--shape` options of the replay's own command line."""
    return [text for s in shapes for text in ("--shape", json.dumps(s.to_json()))]

"""A machine's host from measured steps with prompts: `prompt_step_us` and `enqueue_layer_us`.

A step takes the longer of the GPU's work with `prompt_step_us` around it, and of enqueueing its
layers at `enqueue_layer_us` each (`EngineProfile`). Both are chosen so that the mean absolute
logarithm of predicted over measured is least, among the values that some step gives by itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from moesim.errors import FormatError, InputError
from moesim.serving.batch import BatchShape
from moesim.serving.engines import EngineProfile
from moesim.serving.step_cost import EngineStepCost
from moesim.types import FloatArray

LEAST_STEPS = 3
MOST_MS = 1e6
REMEDY = "give REQUESTSxPROMPT=MS, or =FILE of `vllm bench latency --output-len 1`"
_STEP = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,6})=(.+)")


@dataclass(frozen=True, slots=True)
class HostStep:
    """A step of `requests` whole prompts of `prompt` tokens took `us` microseconds."""

    requests: int
    prompt: int
    us: float

    @property
    def name(self) -> str:
        """REQUESTSxPROMPT."""
        return f"{self.requests}x{self.prompt}"

    @property
    def tokens(self) -> int:
        """Rows of the step."""
        return self.requests * self.prompt


@dataclass(frozen=True, slots=True, eq=False)
class HostFit:
    """engine: the profile with the two constants; predicted_us: of the steps, with it;
    held_out_us: of each step, with the constants that the others give; bound: whether enqueueing
    is what the step takes."""

    engine: EngineProfile
    steps: tuple[HostStep, ...]
    predicted_us: FloatArray
    held_out_us: FloatArray
    bound: tuple[bool, ...]


def read_step(text: str) -> HostStep:
    """`4x1024=41.7` in milliseconds, or a file of `vllm bench latency`, of which the median counts.
    Raises FormatError for anything else, InputError for a file that cannot be read."""
    found = _STEP.fullmatch(text)
    if found is None:
        raise FormatError(f"step {text!r:.60}", REMEDY)
    value = found[3]
    try:
        ms = float(value)
    except ValueError:
        ms = _median_ms(Path(value))
    if not 0 < ms < MOST_MS:
        raise FormatError(f"step {found[1]}x{found[2]} took {ms:g} ms", REMEDY)
    return HostStep(int(found[1]), int(found[2]), ms * 1e3)


def _median_ms(path: Path) -> float:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", REMEDY) from None
    except (ValueError, RecursionError):
        raise FormatError(f"{path}: no JSON", REMEDY) from None
    times = raw.get("latencies") if isinstance(raw, dict) else None
    if not isinstance(times, list) or not times:
        raise FormatError(f"{path}: no `latencies`", REMEDY)
    if not all(type(t) in (int, float) and math.isfinite(t) and t > 0 for t in times):
        raise FormatError(f"{path}: a latency is no number above 0", REMEDY)
    return float(np.median(times)) * 1e3


def fit_host(cost: EngineStepCost, steps: Sequence[HostStep]) -> HostFit:
    """The host of the machine that ran `steps` on the deployment of `cost`.

    Raises InputError for fewer than LEAST_STEPS steps, a size given twice, and steps that the
    engine replays as CUDA graphs, of which the host enqueues no layer.
    """
    names = [s.name for s in steps]
    if len(set(names)) < max(LEAST_STEPS, len(names)):
        raise InputError(
            f"steps {', '.join(names) or 'not given'}",
            f"give {LEAST_STEPS} different sizes or more, small and large",
        )
    small = [s.name for s in steps if s.tokens <= cost.graph_limit]
    if small:
        raise InputError(
            f"step {small[0]}: up to {cost.graph_limit:g} tokens are replayed as CUDA graphs",
            "give steps of more tokens",
        )
    layers = cost.deployment.model.num_hidden_layers
    bare = replace(
        cost.deployment.engine, eager_layer_us=0.0, prompt_step_us=0.0, enqueue_layer_us=0.0
    )
    model = cost.with_engine(bare)
    gpu = np.array([float(model.step_us(_shape(s))) for s in steps])
    measured = np.array([s.us for s in steps])
    found = _constants(gpu, measured, layers)
    others = [np.arange(len(steps)) != i for i in range(len(steps))]
    apart = [_constants(gpu[keep], measured[keep], layers) for keep in others]
    engine = replace(
        bare,
        prompt_step_us=round(found[0], 1),
        enqueue_layer_us=round(found[1], 1),
        basis="measured",
        source=f"the host of one machine, fitted to {len(steps)} steps of"
        f" {cost.deployment.model.name}: {', '.join(names)}",
    )
    return HostFit(
        engine,
        tuple(steps),
        _times(gpu, *found, layers),
        np.array([_times(g, *c, layers) for g, c in zip(gpu, apart, strict=True)]),
        tuple((found[1] * layers > gpu + found[0]).tolist()),
    )


def _shape(step: HostStep) -> BatchShape:
    return BatchShape.of(
        prefill_tokens=step.tokens,
        prefill_pairs=step.requests * step.prompt * (step.prompt + 1) / 2,
        prefill_sequences=step.requests,
    )


def _times(gpu: FloatArray, around: float, each: float, layers: int) -> FloatArray:
    return np.maximum(gpu + around, each * layers)


def _constants(gpu: FloatArray, measured: FloatArray, layers: int) -> tuple[float, float]:
    """(`prompt_step_us`, `enqueue_layer_us`), the smallest of those that fit alike."""
    arounds = sorted({0.0, *np.maximum(measured - gpu, 0.0).tolist()})
    each = sorted({0.0, *(measured / layers).tolist()})

    def off(pair: tuple[float, float]) -> float:
        return float(np.abs(np.log(_times(gpu, *pair, layers) / measured)).mean())

    return min(product(arounds, each), key=lambda pair: (round(off(pair), 9), pair))

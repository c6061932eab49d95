"""`engine host`: a machine's host from steps of a replayed trace, as a file for `--engine`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.cluster import DEFAULT_CLUSTER
from moesim.engine.model_folder import hf_config, spec_of
from moesim.errors import MismatchError
from moesim.figures import text_table
from moesim.files import atomic_write
from moesim.jobs.inputs import token_trace_of
from moesim.jobs.result import Result
from moesim.serving.deployment import deploy
from moesim.serving.host_fit import HostFit, fit_host, read_step
from moesim.serving.step_cost import EngineStepCost

if TYPE_CHECKING:
    import pandas as pd

    from moesim.jobs.inputs import TraceLike

FIRM = 0.1
"""Median error of steps from the others' constants above which the file is called doubtful."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class EngineHost(Result):
    """The fit, with times in ms."""

    fit: HostFit

    @property
    def held_out(self) -> float:
        """Median error of each step with the constants that the other steps give."""
        return float(np.median(np.abs(self.fit.held_out_us / self._measured - 1)))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the steps do not tell."""
        notes = []
        if not any(self.fit.bound):
            notes.append("no step is bound by the host: give smaller ones")
        if all(self.fit.bound):
            notes.append("all steps are bound by the host: give larger ones")
        if self.held_out > FIRM:
            notes.append("these steps do not give one host: measure more sizes, on an idle machine")
        return tuple(notes)

    @property
    def _measured(self) -> np.ndarray:
        return np.array([s.us for s in self.fit.steps])

    def line(self) -> str:
        engine = self.fit.engine
        return (
            f"prompt_step_us {engine.prompt_step_us:g}, enqueue_layer_us"
            f" {engine.enqueue_layer_us:g}; from the other steps {self.held_out:.1%} off in the"
            " median"
        )

    def summary(self) -> str:
        rows = [
            [
                r["step"],
                *(f"{r[key]:.2f}" for key in ("ms", "fitted_ms", "from_others_ms")),
                "host" if r["host_bound"] else "GPU",
            ]
            for r in self._rows()
        ]
        head = ["step", "measured, ms", "fitted", "from the others", "bound by"]
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([text_table(head, rows), self.line(), *notes])

    def _rows(self) -> list[dict[str, Any]]:
        fit = self.fit
        return [
            {
                "step": s.name,
                "ms": s.us / 1e3,
                "fitted_ms": float(fitted) / 1e3,
                "from_others_ms": float(others) / 1e3,
                "host_bound": bound,
            }
            for s, fitted, others, bound in zip(
                fit.steps, fit.predicted_us, fit.held_out_us, fit.bound, strict=True
            )
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "engine": self.fit.engine.to_file(),
            "steps": self._rows(),
            "held_out_median_error": self.held_out,
            "notes": list(self.notes),
        }

    def to_frame(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self._rows())

    def save(self, path: str | Path) -> Path:
        import yaml

        text = yaml.safe_dump(self.fit.engine.to_file(), sort_keys=False, width=100)
        atomic_write(path, text)
        return Path(path)


def engine_host(
    trace: TraceLike,
    steps: Sequence[str],
    *,
    model: str | None = None,
    num_hidden_layers: int | None = None,
    cluster: str = DEFAULT_CLUSTER,
    engine: str = "vllm",
) -> EngineHost:
    """The host of the machine that took `steps` ("REQUESTSxPROMPT=MS", or =FILE) with the replay of
    `trace` on one GPU in bf16, as `engine replay` writes it.

    Raises MismatchError where the trace names no model and none is given, and what `read_step`,
    `fit_host`, `hf_config` and `deploy` raise.
    """
    routing = token_trace_of(trace, "`engine host`")
    name = model or routing.meta.model
    if not name:
        raise MismatchError("the trace names no model", "give a preset or a config.json as `model`")
    read = [read_step(s) for s in steps]
    deployment = deploy(
        spec_of(hf_config(name, num_hidden_layers), name),
        cluster,
        engine=engine,
        tp=1,
        expert_dtype="bf16",
        dense_dtype="bf16",
        max_batch_tokens=max((s.tokens for s in read), default=None),
        trace=routing,
    )
    return EngineHost(fit_host(EngineStepCost(deployment), read))

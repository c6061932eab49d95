"""`validate`: plans replayed on this machine's GPUs, predicted beside measured."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cluster import load_cluster
from moesim.cost.calibration import load_calibration
from moesim.errors import InputError, UnknownNameError
from moesim.figures import text_table
from moesim.jobs.result import Result
from moesim.placement import load_plan
from moesim.replay.cases import load_plans
from moesim.replay.compare import Comparison, Tolerance, compare, load_measured
from moesim.replay.launch import launch
from moesim.replay.predict import LayerPredictor, build_predictor
from moesim.replay.shape import parse_shape
from moesim.replay.start import require_torch, shape_arguments, shape_of
from moesim.trace.format import load_token_trace
from moesim.trace.pools import own_experts

if TYPE_CHECKING:
    import pandas as pd

    from moesim.draw import Picture

log = logging.getLogger("moesim")
MODES = ("graph", "eager", "both")
DEFAULT_TOKENS = (128, 1024, 8192)
OWN_CALIBRATIONS = {2: "h200-torch", 4: "h200x4-torch"}
"""By ranks; other numbers take the nearest."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ValidateResult(Result):
    """record: what was measured; found: the comparison, None where nothing could be predicted, as
    for CPU ranks without a calibration."""

    record: Mapping[str, Any]
    found: Comparison | None = None
    rests_on: tuple[str, ...] = ()

    def failures(self) -> list[str]:
        """What is out of tolerance."""
        return [] if self.found is None else list(self.found.failures())

    def line(self) -> str:
        if self.found is None:
            return f"{len(self.record['results'])} replays measured, none predicted"
        bad = self.failures()
        worst = max((g.median_error for g in self.found.groups), default=0.0)
        said = "within tolerance" if not bad else f"{len(bad)} figures out of tolerance"
        return f"{self.found.model}: {said}; largest median error of a group {worst:.1%}"

    def summary(self) -> str:
        if self.found is None:
            return _measured_table(self.record)
        lines = [f"{self.found.model}: {'; '.join(self.rests_on)}"]
        for group in self.found.groups:
            lines += _group_lines(group)
        failures = self.failures()
        lines.append("\nwithin tolerance" if not failures else "\nout of tolerance:")
        return "\n".join([*lines, *(f"  {line}" for line in failures)])

    def to_json(self) -> dict[str, Any]:
        if self.found is None:
            return dict(self.record)
        return {**self.found.to_json(), "environment": self.record["environment"]}

    def to_frame(self) -> pd.DataFrame:
        """One row per plan, tokens per rank and mode: microseconds per layer."""
        import pandas as pd

        if self.found is None:
            rows = [
                {
                    "plan": r["plan"],
                    "tokens_per_rank": r["tokens_per_rank"],
                    "mode": r["mode"],
                    "measured_us": sum(r["layer_us"]["median"]) / len(r["layer_us"]["median"]),
                }
                for r in self.record["results"]
            ]
        else:
            rows = [
                {
                    "plan": name,
                    "tokens_per_rank": g.tokens_per_rank,
                    "mode": g.mode,
                    "measured_us": real,
                    "predicted_us": ours,
                }
                for g in self.found.groups
                for name, (real, ours) in g.mean_us.items()
            ]
        return pd.DataFrame(rows)

    def picture(self) -> Picture:
        """Predicted against measured."""
        from moesim.jobs.pictures import validation_picture

        if self.found is None:
            raise InputError("nothing was predicted, so there is nothing to draw", "calibrate")
        return validation_picture([self.found])


def validate(
    plan: Sequence[str | Path] | str | Path = (),
    *,
    trace: str | None = None,
    model: str | None = None,
    calibration: str | None = None,
    cluster: str | None = None,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    batches: int = 2,
    layers: int = 8,
    mode: str = "both",
    dedup: str = "gpu",
    replica_policy: str | None = None,
    device: str = "auto",
    timeout: float = 120.0,
    time_limit: float = 3600.0,
    measured: str | Path | None = None,
    repeat: str | Path | None = None,
    out: str | Path | None = None,
    max_median_error: float = 0.10,
    max_p90_error: float = 0.20,
    min_spearman: float = 0.95,
    notify: Callable[[str], None] = log.warning,
) -> ValidateResult:
    """Replay plan files with real collectives and expert kernels and compare with the cost model.

    One process per GPU is started with torchrun; each checks its results against float64 first.
    measured: a record to compare instead of measuring. Names and defaults are those of
    `moesim validate`. Raises InputError and MismatchError that name what does not fit.
    """
    if mode not in MODES:
        raise UnknownNameError("mode", mode, MODES)
    if calibration is not None:
        load_calibration(calibration)
    paths = [Path(plan)] if isinstance(plan, str | Path) else [Path(p) for p in plan]
    if measured is None:
        options = ["--batches", str(batches), "--layers", str(layers), "--mode", mode]
        options += ["--dedup", dedup, "--device", device, "--timeout", str(timeout)]
        options += ["--time-limit", str(time_limit)]
        options += ["--replica-policy", replica_policy] if replica_policy else []
        options += ["--tokens", *map(str, tokens)]
        kept = Path(out) if out is not None else None
        record = _measure(paths, trace, model, options, kept, notify)
    else:
        record = load_measured(Path(measured))
    predictor = _predictor(record, calibration, cluster, notify)
    if predictor is None:
        return ValidateResult(record)
    again = None if repeat is None else load_measured(Path(repeat))
    tolerance = Tolerance(max_median_error, max_p90_error, min_spearman)
    modes = MODES[:2] if mode == "both" else (mode,)
    found = compare(record, predictor, tolerance, again, modes)
    return ValidateResult(record, found, tuple(predictor.step.notes))


def _measure(
    plans: Sequence[Path],
    trace: str | None,
    model: str | None,
    options: list[str],
    out: Path | None,
    notify: Callable[[str], None],
) -> dict[str, Any]:
    if not plans or trace is None:
        raise InputError("a plan and a trace are needed", "give `plan` and `trace`, or `measured`")
    require_torch()
    first = load_plan(plans[0]).together()
    shape = shape_of(model or first.model, notify)
    num_ranks = first.placement.num_gpus
    loaded = load_token_trace(trace, "moesim validate")
    own_experts(loaded, "moesim validate")
    load_plans([str(p) for p in plans], shape, loaded, num_ranks)
    arguments = ["validate", *options, *shape_arguments([shape]), "--trace", loaded.path]
    arguments += [part for p in plans for part in ("--plan", str(p))]
    with tempfile.TemporaryDirectory() as folder:
        written = out or Path(folder) / "measured.json"
        launch([*arguments, "--out", str(written)], num_ranks, notify=notify)
        return load_measured(written)


def _predictor(
    record: dict[str, Any],
    calibration: str | None,
    cluster: str | None,
    notify: Callable[[str], None],
) -> LayerPredictor | None:
    """The cost model for the record's ranks; None for CPU ranks without a calibration."""
    environment = record["environment"]
    on_h200 = "H200" in environment["device"]
    if calibration is None:
        if environment["backend"] != "nccl":
            notify("CPU ranks and no `calibration`: nothing is predicted")
            return None
        if not on_h200:
            raise InputError(
                f"no bundled calibration holds what the replay does on {environment['device']}",
                "measure one with moesim calibrate and give it as `calibration`",
            )
        ranks = int(environment["num_ranks"])
        nearest = min(OWN_CALIBRATIONS, key=lambda known: abs(known - ranks))
        calibration = OWN_CALIBRATIONS[nearest]
        notify(f"no `calibration`: the bundled {calibration} is used")
    return build_predictor(
        parse_shape(record["model"]),
        load_calibration(calibration),
        load_cluster(
            cluster or ("h200-sxm-ib" if on_h200 else "h100-sxm-ib"),
            num_gpus=int(environment["num_ranks"]),
        ),
        record["options"]["dedup"],
    )


def _measured_table(record: Mapping[str, Any]) -> str:
    rows = []
    for r in record["results"]:
        times = r["layer_us"]["median"]
        mean = f"{sum(times) / len(times):.1f}"
        rows.append([r["plan"][:23], str(r["tokens_per_rank"]), r["mode"], str(r["batch"]), mean])
    return text_table(["plan", "tokens", "mode", "batch", "us per layer"], rows)


def _group_lines(group: Any) -> list[str]:
    lines = [
        f"\n{group.tokens_per_rank} tokens per rank, {group.mode}: median error"
        f" {group.median_error:.1%}, p90 {group.p90_error:.1%}; noise {group.noise:.1%}, plans"
        f" differ by {group.spread:.1%}"
    ]
    parts = ", ".join(
        f"{name} {e.measured_us:.1f}/{e.predicted_us:.1f} us ({e.median_of_layer:.1%})"
        for name, e in group.phases.items()
    )
    lines.append(f"  measured/predicted (off by so much of the layer): {parts}")
    rows = []
    for name, (real, ours) in group.mean_us.items():
        faster, foretold = group.speedup[name]
        rows.append(
            [name[:23], f"{real:.1f} us", f"{ours:.1f} us", f"{faster:.3f}", f"{foretold:.3f}"]
        )
    head = ["plan", "measured", "predicted", "speed-up", "predicted"]
    lines += [f"  {line}" for line in text_table(head, rows).splitlines()]
    if group.spearman is not None:
        lines.append(f"  Spearman {group.spearman:.2f} over {group.num_distinct} distinct plans")
    return lines

"""Cache plans on a real GPU: measured time per token beside the prediction."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli.output import echo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moesim.caching.plan import CachePlan
    from moesim.replay.schedule import Schedule
    from moesim.replay.shape import ExpertShape
    from moesim.trace.format import Trace
    from moesim.types import FloatArray

NUM_TOKENS, WARM_TOKENS = 96, 16
OUT_OF_TOLERANCE = 1


def validate_cache(
    plans: Sequence[Path],
    trace: str,
    model: str | None,
    calibration: str | None,
    layers: int,
    device: str,
    timeout: float,
    out: Path | None,
    max_error: float,
    as_json: bool,
) -> int:
    """Replay each cache plan on one GPU, on demand and one layer ahead; the exit code.

    Predicted from `calibration`, else from copy and kernel times that the same run measured.
    """
    from moesim.cli.output import say
    from moesim.replay.launch import launch
    from moesim.replay.records import read_record
    from moesim.replay.start import require_torch, shape_arguments, shape_of

    require_torch()
    schedules, name = _schedules(plans, trace, layers)
    shape = shape_of(model or name, say)
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["offload", *shape_arguments([shape]), "--device", device]
        arguments += ["--timeout", str(timeout), "--warm-tokens", str(WARM_TOKENS)]
        for i, schedule in enumerate(schedules):
            path = Path(folder) / f"{i}.npz"
            schedule.save(path)
            arguments += ["--schedule", str(path)]
        written = out or Path(folder) / "measured.json"
        launch([*arguments, "--out", str(written)], 1, notify=say)
        record = read_record(written, "moesim-offload-measured", "run the replay again")
    rows = [
        _row(result, schedule, shape, calibration)
        for result, schedule in zip(record["results"], schedules, strict=False)
    ]
    good = len(rows) == len(schedules) and all(abs(r["error"]) <= max_error for r in rows)
    if as_json:
        head = {"format": "moesim-cache-validation", "version": 1, "model": name}
        data = {**head, "within_tolerance": good, "caches": rows, **_about(record)}
        echo(json.dumps(data, indent=1))
    else:
        _print(rows, record, good)
    return 0 if good else OUT_OF_TOLERANCE


def _schedules(plans: Sequence[Path], trace: str, layers: int) -> tuple[list[Schedule], str]:
    import numpy as np

    from moesim.caching.plan import load_cache_plan
    from moesim.replay.cache_schedule import plan_schedule
    from moesim.replay.cases import longest_first, pick_layers
    from moesim.trace.format import load_token_trace
    from moesim.trace.pools import own_experts

    loaded = load_token_trace(trace, "moesim validate")
    own_experts(loaded, "moesim validate")
    picked = pick_layers(loaded.num_layers, layers)
    tokens = longest_first(loaded, NUM_TOKENS)
    experts = np.asarray(loaded.expert_ids[tokens])[:, picked].astype(np.int64)
    gates = loaded.gate_weights
    if gates is not None:
        gates = np.asarray(gates[tokens])[:, picked]
    request = np.asarray(loaded.request_ids)[tokens]
    starts = np.concatenate(([True], request[1:] != request[:-1]))
    layer_ids = tuple(loaded.meta.layer_ids[i] for i in picked)
    read = [load_cache_plan(path) for path in plans]
    made = [
        plan_schedule(
            plan,
            experts,
            layer_ids,
            lookahead=lookahead,
            gates=gates,
            starts=starts,
            frequency=_frequency(loaded, plan),
        )
        for plan in read
        for lookahead in (0, 1)
    ]
    return made, read[0].model


def _frequency(trace: Trace, plan: CachePlan) -> FloatArray:
    """[L, E] of the requests that the plan was fitted to, or would be if made from this trace."""
    from moesim.caching.workload import Request, make_workload
    from moesim.errors import FormatError, MismatchError

    seed = plan.provenance.get("seed", 0)
    if type(seed) is not int or seed < 0:
        raise FormatError(
            "provenance.seed of the cache plan is not a number", "make it again with moesim cache"
        )
    if (trace.meta.layer_ids, trace.num_experts) != (plan.layer_ids, plan.num_experts):
        raise MismatchError(
            f"the cache plan has {len(plan.layer_ids)} layers of {plan.num_experts} experts, the"
            f" trace {trace.num_layers} of {trace.num_experts}, or their layer numbers differ",
            "give the trace of the plan's model",
        )
    return make_workload(trace, Request(hbm_gb=1.0, max_steps=1, seed=seed)).frequency


def _row(
    result: dict[str, Any], schedule: Schedule, shape: ExpertShape, calibration: str | None
) -> dict[str, Any]:
    predicted = float(result["predicted_us"])
    if calibration is not None:
        from moesim.cost.calibration import load_calibration
        from moesim.replay.cache_schedule import calibrated_costs
        from moesim.replay.schedule import predict_tokens_us

        costs = calibrated_costs(shape, load_calibration(calibration), schedule)
        warm = schedule.num_tokens - int(result["num_tokens"])
        predicted = float(predict_tokens_us(schedule, costs)[warm:].mean())
    measured = float(result["token_us"]["mean"])
    return {
        "cache": result["label"],
        "copies_per_token": result["copies_per_token"],
        "measured_us": measured,
        "predicted_us": predicted,
        "error": predicted / measured - 1.0,
    }


def _about(record: dict[str, Any]) -> dict[str, Any]:
    return {"environment": record["environment"], "notes": record["notes"]}


def _print(rows: list[dict[str, Any]], record: dict[str, Any], good: bool) -> None:
    echo(f"one {record['environment']['device']}, microseconds per token")
    echo(f"{'cache':<62}{'copies':>8}{'measured':>11}{'predicted':>11}")
    for row in rows:
        echo(
            f"{row['cache']:<62.61}{row['copies_per_token']:>8.1f}{row['measured_us']:>11,.0f}"
            f"{row['predicted_us']:>11,.0f} {row['error']:+.1%}"
        )
    for note in record["notes"]:
        echo(f"note: {note}")
    echo("within tolerance" if good else "out of tolerance")

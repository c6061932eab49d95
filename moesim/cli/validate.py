"""`moesim validate`: replay plans on this machine's GPUs, predicted beside measured."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moesim.replay.compare import Comparison
    from moesim.replay.predict import Predictor

OUT_OF_TOLERANCE = 1
MODES = ("graph", "eager", "both")
OWN_CALIBRATIONS = {2: "h200-torch", 4: "h200x4-torch"}
"""By ranks; other numbers take the nearest."""


def validate(
    plan: Annotated[
        list[Path] | None, typer.Option(help="Plan file; repeat to compare plans.")
    ] = None,
    cache_plan: Annotated[
        list[Path] | None,
        typer.Option(help="Instead of plans: cache plan of moesim cache, on one GPU; repeat."),
    ] = None,
    trace: Annotated[
        str | None, typer.Option(help="Trace file, trace directory, or sample:NAME.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Preset or config.json.", show_default="the plan's model")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Calibration YAML or name; without one on CPUs nothing is predicted.",
            show_default="h200-torch or h200x4-torch on H200s",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Cluster name or YAML file; resized to the ranks.",
            show_default="h200-sxm-ib on H200s, else h100-sxm-ib",
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens a rank; repeat.", show_default="128 1024 8192")
    ] = None,
    batches: Annotated[int, typer.Option(help="Batches of each size.", min=1)] = 2,
    layers: Annotated[int, typer.Option(help="Layers, evenly spaced; 0: all.", min=0)] = 8,
    mode: Annotated[str, typer.Option(help="graph, eager or both.")] = "both",
    dedup: Annotated[str, typer.Option(help="gpu or none.")] = "gpu",
    replica_policy: Annotated[
        str | None, typer.Option(help="split, hash or nearest.", show_default="the plan's")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds without progress.")] = 120.0,
    time_limit: Annotated[float, typer.Option(help="Stop in good order after (s).")] = 3600.0,
    measured: Annotated[
        Path | None, typer.Option(help="Measure nothing: compare this record.")
    ] = None,
    repeat: Annotated[
        Path | None, typer.Option(help="A second record of the same run, for the noise.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the measured record (JSON).")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Predicted against measured (PNG, SVG or PDF).")
    ] = None,
    max_median_error: Annotated[float, typer.Option(help="Tolerance, layer times.")] = 0.10,
    max_p90_error: Annotated[float, typer.Option(help="Tolerance, layer times.")] = 0.20,
    min_spearman: Annotated[float, typer.Option(help="Tolerance, order of plans.")] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> int:
    """Replay plans with real collectives and expert kernels and compare with the cost model.

    One process a GPU is started with torchrun; each checks its results against float64 first.
    Exits with 1 when the predictions are out of tolerance or a result is wrong. A cache plan is
    replayed with experts in host memory, copied into the GPU's slots as the plan's cache does.

    Example: moesim validate --plan linear.json --plan eplb.json --trace t.npz --model olmoe
    """
    from moesim.cli.simulate_input import writable
    from moesim.cost.calibration import load_calibration
    from moesim.errors import InputError, UnknownNameError
    from moesim.replay.compare import Tolerance, compare, load_measured

    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"cannot plot to {plot.name}", "end the name in .png, .svg or .pdf")
    if mode not in MODES:
        raise UnknownNameError("mode", mode, MODES)
    writable(out, plot)
    if calibration is not None:
        load_calibration(calibration)
    if cache_plan:
        from moesim.cli.validate_cache import validate_cache

        if trace is None or plan or measured is not None:
            raise InputError(
                "a cache plan is replayed by itself, with a trace",
                "give --cache-plan and --trace, without --plan and --measured",
            )
        limit = max_median_error
        return validate_cache(
            cache_plan, trace, model, calibration, layers, device, timeout, out, limit, as_json
        )
    if measured is None:
        options = ["--batches", str(batches), "--layers", str(layers), "--mode", mode]
        options += ["--dedup", dedup, "--device", device, "--timeout", str(timeout)]
        options += ["--time-limit", str(time_limit)]
        options += ["--replica-policy", replica_policy] if replica_policy else []
        options += ["--tokens", *map(str, tokens or (128, 1024, 8192))]
        record = _measure(plan or [], trace, model, options, out)
    else:
        record = load_measured(measured)
    predictor = _predictor(record, calibration, cluster)
    if predictor is None:
        _print_measured(record, as_json)
        return 0
    again = None if repeat is None else load_measured(repeat)
    tolerance = Tolerance(max_median_error, max_p90_error, min_spearman)
    modes = MODES[:2] if mode == "both" else (mode,)
    found = compare(record, predictor, tolerance, again, modes)
    if plot is not None:
        from moesim.draw.validate import plot_validation

        plot_validation([found], plot)
    if as_json:
        typer.echo(json.dumps({**found.to_json(), "environment": record["environment"]}, indent=1))
    else:
        _print(found, predictor)
    return OUT_OF_TOLERANCE if found.failures() else 0


def _measure(
    plans: list[Path],
    trace: str | None,
    model: str | None,
    options: list[str],
    out: Path | None,
) -> dict[str, Any]:
    from moesim.cli.replay_common import require_torch, say, shape_arguments, shape_of
    from moesim.errors import InputError
    from moesim.placement import load_plan
    from moesim.replay.cases import load_plans
    from moesim.replay.compare import load_measured
    from moesim.replay.launch import launch
    from moesim.trace.format import load_token_trace

    if not plans or trace is None:
        raise InputError("a plan and a trace are needed", "give --plan and --trace, or --measured")
    require_torch()
    first = load_plan(plans[0])
    shape = shape_of(model or first.model)
    num_ranks = first.placement.num_gpus
    loaded = load_token_trace(trace, "moesim validate")
    load_plans([str(p) for p in plans], shape, loaded, num_ranks)
    arguments = ["validate", *options, *shape_arguments([shape]), "--trace", loaded.path]
    arguments += [part for p in plans for part in ("--plan", str(p))]
    with tempfile.TemporaryDirectory() as folder:
        written = out or Path(folder) / "measured.json"
        launch([*arguments, "--out", str(written)], num_ranks, notify=say)
        return load_measured(written)


def _predictor(
    record: dict[str, Any], calibration: str | None, cluster: str | None
) -> Predictor | None:
    """The cost model for the record's ranks; None for CPU ranks without a calibration."""
    from moesim.cli.replay_common import say
    from moesim.cluster import load_cluster
    from moesim.cost.calibration import load_calibration
    from moesim.errors import InputError
    from moesim.replay.predict import build_predictor
    from moesim.replay.shape import parse_shape

    environment = record["environment"]
    on_h200 = "H200" in environment["device"]
    if calibration is None:
        if environment["backend"] != "nccl":
            say("CPU ranks and no --calibration: nothing is predicted")
            return None
        if not on_h200:
            raise InputError(
                f"no bundled calibration holds what the replay does on {environment['device']}",
                "measure one with moesim calibrate and give it as --calibration",
            )
        ranks = int(environment["num_ranks"])
        nearest = min(OWN_CALIBRATIONS, key=lambda known: abs(known - ranks))
        calibration = OWN_CALIBRATIONS[nearest]
        say(f"no --calibration: the bundled {calibration} is used")
    return build_predictor(
        parse_shape(record["model"]),
        load_calibration(calibration),
        load_cluster(
            cluster or ("h200-sxm-ib" if on_h200 else "h100-sxm-ib"),
            num_gpus=int(environment["num_ranks"]),
        ),
        record["options"]["dedup"],
    )


def _print_measured(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(record))
        return
    typer.echo(f"{'plan':<24}{'tokens':>8} {'mode':<6}{'batch':>6}{'us a layer':>12}")
    for r in record["results"]:
        times = r["layer_us"]["median"]
        typer.echo(
            f"{r['plan']:<24.23}{r['tokens_per_rank']:>8} {r['mode']:<6}{r['batch']:>6}"
            f"{sum(times) / len(times):>12.1f}"
        )


def _print(found: Comparison, predictor: Predictor) -> None:
    typer.echo(f"{found.model}: {'; '.join(predictor.step.notes)}")
    for g in found.groups:
        typer.echo(
            f"\n{g.tokens_per_rank} tokens a rank, {g.mode}: median error {g.median_error:.1%},"
            f" p90 {g.p90_error:.1%}; noise {g.noise:.1%}, plans differ by {g.spread:.1%}"
        )
        parts = ", ".join(
            f"{name} {e.measured_us:.1f}/{e.predicted_us:.1f} us ({e.median_of_layer:.1%})"
            for name, e in g.phases.items()
        )
        typer.echo(f"  measured/predicted (off by so much of the layer): {parts}")
        typer.echo(
            f"  {'plan':<24}{'measured':>12}{'predicted':>12}{'speed-up':>10}{'predicted':>11}"
        )
        for name, (real, ours) in g.mean_us.items():
            faster, foretold = g.speedup[name]
            typer.echo(
                f"  {name:<24.23}{real:>9.1f} us{ours:>9.1f} us{faster:>10.3f}{foretold:>11.3f}"
            )
        if g.spearman is not None:
            typer.echo(f"  Spearman {g.spearman:.2f} over {g.num_distinct} distinct plans")
    failures = found.failures()
    typer.echo("\nwithin tolerance" if not failures else "\nout of tolerance:")
    for line in failures:
        typer.echo(f"  {line}")

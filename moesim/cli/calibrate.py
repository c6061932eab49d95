"""`moesim calibrate`: measure this machine, write the calibration that clusters name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from moesim.cli.output import echo


def calibrate(
    out: Annotated[Path, typer.Option(help="Calibration YAML to write.")],
    model: Annotated[
        list[str] | None,
        typer.Option(help="Preset or config.json whose experts to measure; repeat."),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(help="Processes, one a GPU.", min=1, show_default="all GPUs, or 2"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    section: Annotated[
        list[str] | None, typer.Option(help="Only this part, e.g. ffn; repeat.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Largest batch, tokens per rank.", min=1)] = 8192,
    max_bytes: Annotated[int, typer.Option(help="Largest message or copy.", min=1)] = 512 << 20,
    time_limit: Annotated[float, typer.Option(help="Stop in good order after (s).")] = 240.0,
    timeout: Annotated[float, typer.Option(help="Seconds without progress.")] = 120.0,
    budget: Annotated[float, typer.Option(help="Seconds of timing a case.")] = 0.06,
    raw: Annotated[
        Path | None, typer.Option(help="Also keep what the ranks wrote, as JSON.")
    ] = None,
    from_raw: Annotated[
        list[Path] | None,
        typer.Option(help="Measure nothing: convert such a JSON; sections of a repeat replace."),
    ] = None,
    host: Annotated[
        bool,
        typer.Option(
            "--host",
            help="Measure this computer's memory, CPU and host link instead: a host for --machine.",
        ),
    ] = False,
    name: Annotated[str, typer.Option(help="Name of the calibration or host.")] = "host",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Measure links, expert kernels, row moves and host copies of this machine.

    Starts one process a GPU with torchrun (NCCL; gloo without GPUs). Inside a container that has
    torch alone, run `torchrun -m moesim.replay calibrate --out raw.json` there and convert the
    result here with --from-raw.

    Example: moesim calibrate --out host.yaml --model mixtral-8x7b
    """
    from moesim.cli.output import check_targets
    from moesim.cost.calibration import parse_calibration_file
    from moesim.replay.table_lines import link_lines, link_rows
    from moesim.replay.tables import load_raw, merge_raw, write_calibration

    check_targets(out, raw)
    if host:
        _measure_host(out, name, bool(model or section or raw or from_raw), as_json)
        return
    if from_raw:
        record = merge_raw([load_raw(path) for path in from_raw])
    else:
        arguments = ["--device", device, "--max-tokens", str(max_tokens)]
        arguments += ["--max-bytes", str(max_bytes), "--time-limit", str(time_limit)]
        arguments += ["--timeout", str(timeout), "--budget", str(budget)]
        arguments += [part for s in section or [] for part in ("--section", s)]
        record = _measure(arguments, model or [], ranks, device, raw)
    write_calibration(record, out, name)
    made = parse_calibration_file(out.read_text(encoding="utf-8"), where=str(out))
    if as_json:
        found = {**_summary(record, out), "links": link_rows(made)}
        echo(json.dumps(found, indent=1))
        return
    echo(f"{out}: {made.gpu}")
    for line in [*_lines(record), *link_lines(made)]:
        echo(line)


def _measure_host(out: Path, name: str, others: bool, as_json: bool) -> None:
    from moesim.cli.output import say
    from moesim.errors import InputError
    from moesim.jobs.calibrate_host import calibrate_host

    if others:
        raise InputError(
            "--host goes with --out and --name alone", "measure GPUs in a run of their own"
        )
    done = calibrate_host(out, name=name, progress=say)
    echo(json.dumps(done.to_json(), indent=1) if as_json else done.summary())


def _measure(
    arguments: list[str], models: list[str], ranks: int | None, device: str, raw: Path | None
) -> dict[str, Any]:
    from moesim.cli.output import say
    from moesim.replay.launch import launch
    from moesim.replay.start import count_gpus, require_torch, shape_arguments, shape_of
    from moesim.replay.tables import load_raw

    require_torch()
    shapes = shape_arguments([shape_of(m, say) for m in models])
    num_ranks = ranks or (0 if device == "cpu" else count_gpus()) or 2
    with tempfile.TemporaryDirectory() as folder:
        written = raw or Path(folder) / "raw.json"
        launch(["calibrate", *arguments, *shapes, "--out", str(written)], num_ranks, notify=say)
        return load_raw(written)


def _summary(record: dict[str, Any], out: Path) -> dict[str, Any]:
    return {
        "calibration": str(out),
        "environment": record["environment"],
        "kernels": record["kernels"],
        "notes": record["notes"],
        "num_rows": {name: len(rows) for name, rows in record["tables"].items()},
    }


def _lines(record: dict[str, Any]) -> list[str]:
    kernels = record["kernels"]
    out = [f"kernels: {kernels['ffn']}, {kernels['reduce']}, CUDA graphs: {kernels['graphs']}"]
    out += [f"{name}: {len(rows)} measurements" for name, rows in record["tables"].items()]
    return out + [f"note: {note}" for note in record["notes"]]

"""`moesim whatif`: studies over many deployments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moesim.cli.options import JsonOption, PlotOption, PriceOption
from moesim.cli.output import echo
from moesim.errors import InputError
from moesim.numerals import number, whole


def whatif(
    study: Annotated[
        Path | None, typer.Argument(help="Study file (YAML); options add to it and override it.")
    ] = None,
    evaluator: Annotated[
        str | None,
        typer.Option(
            help="How a point is evaluated: static, requests, plan, step or cache.",
            show_default="requests with --requests, else static",
        ),
    ] = None,
    trace: Annotated[
        str | None, typer.Option(help="Trace, or several with commas between.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Preset or config.json, or several.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Cluster name or YAML file, or several.")
    ] = None,
    gpus: Annotated[str | None, typer.Option(help="Numbers of GPUs: 8,16,32.")] = None,
    requests: Annotated[
        str | None,
        typer.Option(
            help="Request log or process, for evaluator requests; or several:"
            " poisson:rate=8,requests=2000,poisson:rate=16,requests=4000."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Fix a parameter: NAME=VALUE. May repeat.", metavar="NAME=V"),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(help="Vary a parameter: NAME=V1,V2,... May repeat.", metavar="NAME=V,V"),
    ] = None,
    slo: Annotated[
        str | None, typer.Option(help="Promises to keep: tpot_p99<50ms,ttft_p99<2s.")
    ] = None,
    minimize: Annotated[
        str | None, typer.Option(help="gpus, cost (dollars per hour) or a figure.")
    ] = None,
    maximize: Annotated[str | None, typer.Option(help="throughput or a figure.")] = None,
    per: Annotated[
        str | None,
        typer.Option(
            help="An answer for each value of this parameter: model, cluster.", metavar="NAME"
        ),
    ] = None,
    price: PriceOption = None,
    sensitivity: Annotated[
        float | None,
        typer.Option(
            help="Ask again with each input this share lower and higher; 0 for not.",
            show_default="0.2",
            min=0,
        ),
    ] = None,
    search: Annotated[
        int | None,
        typer.Option(help="Evaluate at most so many points of the grid.", min=1),
    ] = None,
    stop_early: Annotated[
        bool,
        typer.Option(
            "--stop-early", help="Skip points that take more GPUs or dollars than an answer."
        ),
    ] = False,
    max_points: Annotated[
        int, typer.Option(help="Refuse grids with more points than this.", min=1)
    ] = 2000,
    backend: Annotated[
        str,
        typer.Option(help="serial, local, local:4, dask://host:port or ray://host:port."),
    ] = "local",
    out: Annotated[Path, typer.Option(help="Result to write.")] = Path("study.json"),
    journal: Annotated[
        Path | None,
        typer.Option(
            help="Finished points; a study that was stopped goes on from it.",
            show_default="beside --out, ending in .journal.jsonl",
        ),
    ] = None,
    plot: PlotOption = None,
    rows: Annotated[int, typer.Option(help="Rows of the table.", min=1)] = 20,
    as_json: JsonOption = False,
) -> None:
    """What if: evaluate a grid of deployments, answer a question about it, and see whether the
    answer holds when the inputs change. Exit code 1 if no point keeps the promises, or none fits.

    Example: moesim whatif --evaluator plan --trace sample:debian-moe --gpus 4,8,16 --vary
    solver=linear,eplb
    """
    from moesim.cli.output import check_targets, given, notice, wrote
    from moesim.cli.progress import progress_bar
    from moesim.studies.job import study as run

    beside = journal or out.with_name(f"{out.stem}.journal.jsonl")
    check_targets(out, beside, plot=plot)
    named = {"trace": trace, "model": model, "cluster": cluster, "gpus": gpus, "requests": requests}
    fixed, varied = _parameters(named, set_ or [], vary or [])
    with progress_bar("evaluating points") as progress:
        result = run(
            **given(
                run,
                locals(),
                file=study,
                fixed=fixed,
                vary=varied,
                price=price or (),
                journal=beside,
            )
        )
    result.save(out)
    if plot is not None:
        result.plot(plot)
    if as_json:
        echo(json.dumps(result.to_json(), indent=1, allow_nan=False))
    else:
        echo(result.summary(rows))
    results = result.results
    notice(*results.notices)
    reused = f", {results.num_reused} taken from {beside.name}" if results.num_reused else ""
    echo(f"{results.num_computed} points evaluated{reused}", err=True)
    echo(wrote(out, plot), err=True)
    if results.failures:
        raise RuntimeError(
            f"{len(results.failures)} points failed, the first with: {results.failures[0].error};"
            " run this again to try them again"
        )
    if not result.answered:
        raise typer.Exit(1)


def _parameters(
    given: dict[str, str | None], fixed: list[str], varied: list[str]
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Options that name parameters: one value is fixed, several vary."""
    items = [(name, value, True) for name, value in given.items() if value is not None]
    items += [(*_assignment(text, "--set"), False) for text in fixed]
    items += [(*_assignment(text, "--vary"), True) for text in varied]
    fix: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    for name, text, listed in items:
        if name in fix or name in grid:
            raise InputError(f"{name} is given twice", "give each parameter once")
        values = [_value(part) for part in _entries(name, text)] if listed else [_value(text)]
        if len(values) == 1:
            fix[name] = values[0]
        else:
            grid[name] = values
    return fix, grid


def _assignment(text: str, option: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip() or not value.strip():
        raise InputError(f"{option} {text[:80]} is no assignment", f"write {option} NAME=VALUE")
    return name.strip(), value.strip()


def _entries(name: str, text: str) -> list[str]:
    """The values of a list; commas inside an arrival process do not part it."""
    if name != "requests":
        return text.split(",")
    from moesim.serving.synthetic import split_processes

    return split_processes(text)


def _value(text: str) -> Any:
    """A number, a boolean, nothing, or the text itself."""
    word = text.strip()
    known: dict[str, Any] = {"true": True, "false": False, "none": None, "null": None}
    if word.lower() in known:
        return known[word.lower()]
    for kind in (whole, number):
        try:
            return kind(word)
        except ValueError:
            continue
    return word

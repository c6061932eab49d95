"""`moesim whatif`: studies over many deployments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.studies.run import Results

LISTED = ("trace", "model", "cluster", "gpus", "requests")


def whatif(
    study: Annotated[
        Path | None, typer.Argument(help="Study file (YAML); options add to it and override it.")
    ] = None,
    evaluator: Annotated[
        str | None,
        typer.Option(
            help="How a point is evaluated: static, requests, plan, step or cache.",
            show_default="static",
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
        str | None, typer.Option(help="Request log, for evaluator requests; or several.")
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
        str | None, typer.Option(help="gpus, cost (dollars an hour) or a figure.")
    ] = None,
    maximize: Annotated[str | None, typer.Option(help="throughput or a figure.")] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(
            help="Dollars a GPU-hour: 2.5, or GPU=2.5. May repeat.",
            show_default="the assumed figures of the cluster files",
        ),
    ] = None,
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
    plot: Annotated[
        Path | None, typer.Option(help="Picture of the front and the sensitivity (PNG, SVG, PDF).")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of the table.", min=1)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """What if: evaluate a grid of deployments, answer a question about it, and see whether the
    answer holds when the inputs change. Exit code 1 if no point keeps the promises, or none fits.

    Example: moesim whatif --evaluator plan --trace sample:debian-moe --gpus 4,8,16 --vary
    solver=linear,eplb
    """
    from moesim.backend import open_backend
    from moesim.cli.progress import progress_bar
    from moesim.cli.whatif_print import print_results
    from moesim.studies.file import read_study
    from moesim.studies.prices import parse_prices
    from moesim.studies.result import save, to_json
    from moesim.studies.run import make_study, run_study

    content: dict[str, Any] = read_study(study) if study is not None else {}
    given = {"trace": trace, "model": model, "cluster": cluster, "gpus": gpus, "requests": requests}
    _parameters(content, given, set_ or [], vary or [])
    if minimize is not None or maximize is not None:
        content.pop("minimize", None)
        content.pop("maximize", None)
    asked = {
        "evaluator": evaluator,
        "slo": slo,
        "minimize": minimize,
        "maximize": maximize,
        "prices": parse_prices(price) if price else None,
        "sensitivity": None if sensitivity is None else (sensitivity or False),
        "stop_early": stop_early or None,
        "search": None if search is None else {**(content.get("search") or {}), "points": search},
    }
    content.update({name: value for name, value in asked.items() if value is not None})
    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"cannot plot to {plot.name}", "end the name in .png, .svg or .pdf")
    beside = journal or out.with_name(f"{out.stem}.journal.jsonl")
    for target in (out, plot, beside):
        if target is not None:
            _check_target(target)
    made = make_study(content, max_points=max_points)
    with open_backend(backend) as opened, progress_bar("evaluating points") as progress:
        results = run_study(made, opened, journal=beside, progress=progress)
    data = to_json(results)
    save(data, out)
    if plot is not None:
        from moesim.draw.study import plot_study

        plot_study(data, plot)
    if as_json:
        typer.echo(json.dumps(data, indent=1, allow_nan=False))
    else:
        print_results(data, rows)
    _print_end(results, out, plot, beside)
    if results.failures:
        raise RuntimeError(
            f"{len(results.failures)} points failed, the first with: {results.failures[0].error};"
            " run this again to try them again"
        )
    if results.answer is None:
        raise typer.Exit(1)


def _parameters(
    content: dict[str, Any], given: dict[str, str | None], fixed: list[str], varied: list[str]
) -> None:
    """Put the options that name parameters into `content`: one value is fixed, several vary."""
    if any(not isinstance(content.get(k, {}), dict) for k in ("fixed", "grid")):
        return
    fix = content["fixed"] = dict(content.get("fixed") or {})
    grid = content["grid"] = dict(content.get("grid") or {})
    items = [(name, value, True) for name, value in given.items() if value is not None]
    items += [(*_assignment(text, "--set"), False) for text in fixed]
    items += [(*_assignment(text, "--vary"), True) for text in varied]
    seen: set[str] = set()
    for name, text, listed in items:
        if name in seen:
            raise InputError(f"{name} is given twice", "give each parameter once")
        seen.add(name)
        values = [_value(part) for part in text.split(",")] if listed else [_value(text)]
        fix.pop(name, None)
        grid.pop(name, None)
        if len(values) == 1:
            fix[name] = values[0]
        else:
            grid[name] = values


def _assignment(text: str, option: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip() or not value.strip():
        raise InputError(f"{option} {text[:80]} is no assignment", f"write {option} NAME=VALUE")
    return name.strip(), value.strip()


def _value(text: str) -> Any:
    """A number, a boolean, nothing, or the text itself."""
    word = text.strip()
    known: dict[str, Any] = {"true": True, "false": False, "none": None, "null": None}
    if word.lower() in known:
        return known[word.lower()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _check_target(path: Path) -> None:
    """Refuse before the work what could not be written after it."""
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a directory", "name a file")
    if not path.resolve().parent.is_dir():
        raise InputError(
            f"cannot write {path}: there is no folder {path.parent}",
            "name a file in a folder that exists",
        )


def _print_end(results: Results, out: Path, plot: Path | None, journal: Path) -> None:
    for notice in results.notices:
        typer.echo(f"note: {notice}", err=True)
    reused = f", {results.num_reused} taken from {journal.name}" if results.num_reused else ""
    typer.echo(f"{results.num_computed} points evaluated{reused}", err=True)
    typer.echo(f"wrote {out}" + (f" and {plot}" if plot is not None else ""), err=True)

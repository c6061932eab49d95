"""`moesim recommend`: how many GPUs, how to split them, and the lines that start it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from moesim.cli.options import (
    ExpertDtypeOption,
    JsonOption,
    KvDtypeOption,
    MemoryFractionOption,
    PlotOption,
    PriceOption,
    SeedOption,
)
from moesim.cli.output import echo
from moesim.errors import InputError


def recommend(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Preset, Hugging Face config.json or model folder. May repeat."),
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            help="Type of GPU, in its bundled cluster. May repeat.", show_default="h200-sxm"
        ),
    ] = None,
    cluster: Annotated[
        list[str] | None,
        typer.Option(help="Cluster name or YAML file instead of --gpu. May repeat."),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="vllm, sglang or trtllm. May repeat.", show_default="vllm"),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second to serve.")] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Prompt tokens: a number, or lognormal(1000;0.8) and the like.",
            show_default="1000",
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Output tokens, likewise.", show_default="300")
    ] = None,
    requests: Annotated[
        str | None, typer.Option(help="Request log instead of a rate and lengths.", metavar="FILE")
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(
            help="Promises to keep: ttft_p99<2s,tpot_p99<50ms.",
            show_default="none, and one is needed",
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="Most GPUs to use.", show_default="256", min=1)
    ] = None,
    maximize: Annotated[
        Literal["goodput"] | None,
        typer.Option(help="Most requests/s on --gpus GPUs within the promises."),
    ] = None,
    expert_dtype: ExpertDtypeOption = None,
    kv_dtype: KvDtypeOption = "bf16",
    memory_fraction: MemoryFractionOption = None,
    decode_gpu: Annotated[
        str | None,
        typer.Option(
            help="Another type of GPU for decoding: prompts are then computed apart, on --gpu, and"
            " least $/h is looked for.",
            show_default="--gpu",
        ),
    ] = None,
    speculate: Annotated[
        float | None,
        typer.Option(
            help="Speculation by the model's own MTP layers, with this acceptance of a drafted"
            " token.",
            show_default="none; tried beside",
        ),
    ] = None,
    drafts: Annotated[int, typer.Option(help="Tokens drafted in every step.", min=1)] = 1,
    redundant_experts: Annotated[
        bool,
        typer.Option(
            "--redundant-experts", help="Also engines with a redundant expert per GPU, by EPLB."
        ),
    ] = False,
    alternatives: Annotated[
        bool,
        typer.Option(
            "--alternatives/--no-alternatives",
            help="Say what another precision, speculation or redundant experts would save.",
        ),
    ] = True,
    experts_apart: Annotated[
        bool,
        typer.Option(
            "--experts-apart", help="Also say whether experts on GPUs of their own need fewer."
        ),
    ] = False,
    trace: Annotated[
        str | None,
        typer.Option(
            help="Routing trace of the model: how uneven experts are, and what redundant ones are"
            " worth.",
            metavar="TRACE",
            show_default="assumed skew",
        ),
    ] = None,
    price: PriceOption = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            help="Result of an engine's own benchmark (bench.sh), beside the prediction of"
            " --answer; --out then is a file of the engine's constants refitted to it, --engine"
            " such a file to predict with."
        ),
    ] = None,
    answer: Annotated[
        Path | None, typer.Option(help="Folder that --out wrote, whose first option was measured.")
    ] = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the answer, and the engine's launch lines and settings."),
    ] = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Recommend how many GPUs a service needs and how to split them, with the next best options.

    Example: moesim recommend --model DeepSeek-V3 --gpu h200-sxm --rate 50 --slo
    "ttft_p99<2s,tpot_p99<50ms"
    """
    from moesim.cli.output import check_folder, check_targets, given, notice, wrote
    from moesim.cli.progress import progress_bar
    from moesim.studies.recommend.job import recommend as run

    if measured is not None or answer is not None:
        _measured(measured, answer, engine, out, plot, as_json)
        return
    if not model:
        raise InputError("no `model` is named", "name a preset or a Hugging Face config.json")
    check_targets(plot=plot)
    check_folder(out)
    with progress_bar("trying layouts") as progress:
        result = run(
            **given(
                run,
                locals(),
                engine=engine or "vllm",
                price=price or (),
            )
        )
    if plot is not None:
        result.plot(plot)
    if out is not None:
        result.save(out)
    notice(*result.notices)
    if as_json:
        echo(json.dumps(result.to_json(), indent=1, allow_nan=False))
    else:
        echo(result.summary())
    if out is not None or plot is not None:
        echo(wrote(out, plot), err=True)
    if not result.kept:
        raise typer.Exit(1)


def _measured(
    measured: Path | None,
    answer: Path | None,
    engine: list[str] | None,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    from moesim.cli.output import check_targets, wrote
    from moesim.studies.recommend.measured import compare_measured

    if measured is None or answer is None:
        raise InputError(
            "`measured` and `answer` go together: a result, and the recommendation it is of",
            "give both",
        )
    if engine is not None and len(engine) > 1:
        raise InputError("several of `engine` with `measured`", "give one, or none")
    check_targets(out, plot=plot)
    result = compare_measured(answer, measured, engine[0] if engine else None)
    if plot is not None:
        result.plot(plot)
    if out is not None:
        result.save(out)
    echo(json.dumps(result.to_json(), indent=1) if as_json else result.summary())
    if out is not None or plot is not None:
        echo(wrote(out, plot), err=True)

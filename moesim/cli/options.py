"""Options that several commands have, each once: its name, its help, its limits. Where a default
is a choice made for the user, the library's function has it, and the command prints it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.choices import MoveThrough, Phase, ReplicaPolicy

TraceOption = Annotated[
    str,
    typer.Option("--trace", help="Trace file, trace directory, or sample:NAME.", metavar="TRACE"),
]
MaybeTraceOption = Annotated[
    str | None,
    typer.Option("--trace", help="Trace file, trace directory, or sample:NAME.", metavar="TRACE"),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Preset, Hugging Face config.json or model folder, or .gguf file.",
        show_default="the one that the trace or plan names",
    ),
]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        "--machine",
        help="Cluster name or YAML file, resized to --gpus; or a machine, as rtx-4090+ddr5-2ch.",
        show_default="h100-sxm-ib",
    ),
]
MaybeGpusOption = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        help="GPUs of one expert-parallel group.",
        show_default="those of the machine",
        min=1,
    ),
]
GroupGpusOption = Annotated[
    int, typer.Option("--gpus", help="GPUs of one expert-parallel group.", min=1)
]
ExpertDtypeOption = Annotated[
    str | None,
    typer.Option("--expert-dtype", help="Experts' weights.", show_default="the model's"),
]
KvDtypeOption = Annotated[str, typer.Option("--kv-dtype", help="KV cache: bf16 or fp8.")]
MemoryFractionOption = Annotated[
    float | None,
    typer.Option(
        "--memory-fraction", help="Share of GPU memory in use.", show_default="the engine's"
    ),
]
PriceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--price",
        help="Dollars per GPU-hour: 2.5, or GPU=2.5. May repeat.",
        show_default="the assumed figures of the cluster files",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Same seed, same bytes.", min=0)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", help="Picture to write (.png, .svg or .pdf).")
]
RerouteOption = Annotated[
    str | None,
    typer.Option(
        "--reroute",
        help="Rule of routing for the trace first, as drop:factor=1.25 (moesim routing list).",
        metavar="RULE",
    ),
]
ReplicaPolicyOption = Annotated[
    ReplicaPolicy | None,
    typer.Option(
        "--replica-policy",
        help="How a replica is chosen.",
        show_default="the plan's, or split",
    ),
]
ExpertGpusOption = Annotated[
    int | None,
    typer.Option(
        help="Attention and experts apart: so many of the last GPUs (of an engine) hold its routed"
        " experts and nothing else.",
        show_default="on attention's GPUs",
        min=1,
    ),
]
MtpOption = Annotated[
    bool,
    typer.Option(
        "--mtp", help="With the model's multi-token-prediction layers: rows, memory, and steps."
    ),
]
MicroBatchesOption = Annotated[
    int, typer.Option(help="Parts of a step that go back and forth between the two.", min=1)
]
PhaseOption = Annotated[
    Phase | None,
    typer.Option(
        "--phase",
        help="Steps of prompts or of output tokens.",
        show_default="what the plan or trace has",
    ),
]
MaxBatchTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-batch-tokens",
        help="Tokens of a step of one rank.",
        show_default="the engine's",
        min=1,
    ),
]
BatchTokensOption = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens",
        help="Tokens of a step over all GPUs.",
        show_default="the plan's, else 4096 prefill or 256 decode",
        min=1,
        max=1 << 20,
    ),
]

RebalancePlanOption = Annotated[float, typer.Option(help="Ms to compute a placement.")]
RebalanceLayerOption = Annotated[
    float | None,
    typer.Option(
        help="Ms of host work for each layer that moves.",
        show_default="as measured on these GPUs, else 9",
        min=0,
    ),
]
RebalanceThroughOption = Annotated[
    MoveThrough | None,
    typer.Option(
        help="Library that carries weights, as measured in vLLM on H200s: gloo is what vLLM takes"
        " without NIXL.",
        show_default="over the links",
    ),
]

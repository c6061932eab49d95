"""A machine's host from the steps of one model, judged on the steps of others.

    python verification/engine/host_tables.py reports/engine-vllm FOLDER --data DIR [--write]

Reads raw/host-*: prefill and decode under the trace's routing on two machines. Steps of more than
512 tokens of one model give the host (`moesim engine host`); the prefill steps of the other models
are predicted with it, with the profile of vLLM as it is, and with the report's host.yaml, which is
of other machines. FOLDER and DIR as for prepare.py.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cases import MODELS, Case
from predict import HOST, deployment, shape_of
from prepare import trace_of
from tables import put, samples

from moesim.serving.engines import EngineProfile, engine_profile
from moesim.serving.host_fit import HostStep, fit_host
from moesim.serving.step_cost import EngineStepCost

SOURCES = ("olmoe", "qwen3-30b", "qwen3-30b-second")
GRAPHED = 512
"""Steps of so many tokens are replayed as graphs by default, so a user cannot take them."""


@dataclass(frozen=True, eq=False)
class Start:
    """One start of the engine: its model's steps (ms) and costs."""

    model: str
    cost: EngineStepCost
    ms: Mapping[Case, float]

    def steps(self) -> list[HostStep]:
        """Those that `moesim engine host` takes."""
        return [
            HostStep(c.requests, c.prompt, ms * 1e3)
            for c, ms in self.ms.items()
            if c.phase == "prefill" and c.requests * c.prompt > GRAPHED
        ]

    def errors(self, phase: str, engine: EngineProfile | None) -> np.ndarray:
        """Signed errors under a profile, by default the bundled one."""
        cost = self.cost if engine is None else self.cost.with_engine(engine)
        name = MODELS[self.model].set
        return np.array(
            [
                float(cost.step_us(shape_of(c, name))) / 1e3 / ms - 1
                for c, ms in self.ms.items()
                if c.phase == phase
            ]
        )


def starts_of(report: Path, folder: Path, data: Path) -> dict[str, Start]:
    """Every start by the name of its record."""
    found = {}
    for path in sorted((report / "raw").glob("host-*.json.gz")):
        record = json.loads(gzip.decompress(path.read_bytes()))
        model = record["model"]
        cost = EngineStepCost(deployment(model, trace_of(MODELS[model], data, folder)))
        cost.graph_limit = 0.0  # these starts compile nothing: prompts are never in graphs
        ms = {}
        for name in record["cases"]:
            phase, size = name.split("-")
            requests, prompt = size.split("x")
            case = Case(phase, int(requests), int(prompt))
            ms[case] = float(np.median(samples(record, name, "trace", "graph")))
        found[path.name.removeprefix("host-").removesuffix(".json.gz")] = Start(model, cost, ms)
    return found


def _row(name: str, engine: EngineProfile | None, judged: list[Start]) -> str:
    e = np.concatenate([s.errors("prefill", engine) for s in judged])
    host = "" if engine is None else f"{engine.prompt_step_us / 1e3:.1f}"
    layer = "" if engine is None else f"{engine.enqueue_layer_us / 1e3:.2f}"
    size = np.abs(e)
    return (
        f"| {name} | {host} | {layer} | {len(e)} | {np.median(size):.1%} |"
        f" {np.percentile(size, 90):.1%} | {np.median(e):+.1%} |"
    )


def hosts_table(starts: Mapping[str, Start]) -> str:
    """Prefill steps by where the host's constants are from."""
    lines = ["| host from | ms around a step | ms per layer | steps of other models |"]
    lines[0] += " median error | 90th percentile | bias |"
    lines += ["|---|---|---|---|---|---|---|"]
    everyone = list(starts.values())
    lines.append(_row("the profile of vLLM", None, everyone))
    lines.append(_row("`host.yaml`, other machines", engine_profile(str(HOST)), everyone))
    for name in SOURCES:
        own = starts[name]
        others = [s for s in everyone if s.model != own.model]
        lines.append(_row(name, fit_host(own.cost, own.steps()).engine, others))
    return "\n".join(lines)


def steps_table(starts: Mapping[str, Start]) -> str:
    """Every step: measured, and signed errors."""
    own = {n: fit_host(starts[n].cost, starts[n].steps()).engine for n in SOURCES}
    engines = {"profile": None, "host.yaml": engine_profile(str(HOST)), **own}
    lines = ["| start | step | measured, ms | " + " | ".join(engines) + " |"]
    lines += ["|---|---|---|" + "---|" * len(engines)]
    for name, start in starts.items():
        for phase in ("prefill", "decode"):
            errors = [start.errors(phase, e) for e in engines.values()]
            cases = [c for c in start.ms if c.phase == phase]
            for i, case in enumerate(cases):
                cells = " | ".join(f"{e[i]:+.0%}" for e in errors)
                lines.append(f"| {name} | {case.key} | {start.ms[case]:.2f} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """The steps on stdout, the table of hosts into the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    starts = starts_of(args.report, args.folder, args.data)
    print(steps_table(starts))
    put(args.report, {"hosts": hosts_table(starts)}, write=args.write)


if __name__ == "__main__":
    main()

"""Runs of a small model, made once with the real commands, and pages from them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moesim.cli.main import run as run_command
from moesim.trace.format import save_trace

GPUS = 4
LAYERS, EXPERTS, TOP_K = 8, 64, 8
MODEL = "debian-olmoe"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, build: Any) -> SimpleNamespace:
    """A folder with the results of five commands, each named by what it is, and the trace."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(5)
    taste = 0.7 * rng.standard_normal((LAYERS, EXPERTS))
    noise = rng.gumbel(size=(3000, LAYERS, EXPERTS))
    ids = np.argsort(-(taste + noise), axis=2)[:, :, :TOP_K]
    trace = build.make_trace(ids, EXPERTS, request_ids=np.repeat(np.arange(60), 50), model=MODEL)
    save_trace(trace, folder / "trace.npz")
    where = str(folder / "trace.npz")
    common = ["--trace", where, "--model", MODEL]
    plan = ["plan", *common, "--gpus", str(GPUS), "--batch-tokens", "400", "--solver", "greedy"]
    files = {
        "plan-run": [*plan, "--out", str(folder / "plan.json")],
        "simulation": [
            *("simulate", *common, "--plan", str(folder / "plan.json")),
            *("--compare", "linear,eplb", "--steps", "4"),
        ],
        "cache": [
            *("cache", *common, "--hbm", "1.2", "--steps", "64", "--policy", "lru"),
            *("--prefetch", "none", "--cpu", "off", "--plot", str(folder / "speed.svg")),
        ],
    }
    promise = ["--model", MODEL, "--slo", "tpot_p99<50ms"]
    files["serving"] = [
        *("simulate", "--requests", "poisson:rate=20,requests=60,prompt=200,output=20"),
        *(*promise, "--gpus", "2"),
    ]
    files["study"] = [
        *("whatif", "--evaluator", "static", *promise, "--gpus", "1,2", "--minimize", "cost"),
        *("--vary", "concurrency=4,16", "--backend", "serial", "--set", "output_tokens=16"),
        *("--out", str(folder / "written.txt"), "--journal", str(folder / "journal.txt")),
    ]
    files["recommendation"] = ["recommend", *promise, "--rate", "5", "--gpus", "2"]
    for name, arguments in files.items():
        (folder / f"{name}.json").write_text(_printed([*arguments, "--json"]))
    (folder / "speed.svg").unlink()
    return SimpleNamespace(folder=folder, trace=where, gpus=GPUS, layers=LAYERS)


def _printed(arguments: list[str]) -> str:
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = run_command(arguments, debug=True)
    assert code == 0, arguments
    json.loads(text.getvalue())
    return text.getvalue()


@pytest.fixture(scope="session")
def validation() -> dict[str, Any]:
    """What `moesim validate --json` prints, of two plans, two modes and three layers."""
    rng = np.random.default_rng(1)
    cases, groups = [], []
    for tokens in (128, 1024):
        for mode in ("graph", "eager"):
            for plan in ("linear", "eplb"):
                measured = (tokens * (1 + 0.2 * rng.random(3))).round(2)
                cases.append(
                    {
                        "plan": plan,
                        "tokens_per_rank": tokens,
                        "mode": mode,
                        "batch": 0,
                        "mark_us": 5.0,
                        "measured_us": measured.tolist(),
                        "predicted_us": (measured * 1.05).round(2).tolist(),
                    }
                )
            groups.append(
                {
                    "tokens_per_rank": tokens,
                    "mode": mode,
                    "num_plans": 2,
                    "num_distinct": 2,
                    "median_error": 0.05,
                    "p90_error": 0.05,
                    "phases": {},
                    "mark_us": 5.0,
                    "noise": 0.01,
                    "spread": 0.1,
                    "spearman": None,
                    "spearman_all": 1.0,
                    "mean_us": {"linear": [100.0, 105.0], "eplb": [90.0, 95.0]},
                    "speedup": {"linear": [1.0, 1.0], "eplb": [1.111, 1.105]},
                }
            )
    return {
        "format": "moesim-validation",
        "version": 1,
        "model": MODEL,
        "within_tolerance": True,
        "failures": [],
        "tolerance": {"median_error": 0.1, "p90_error": 0.2, "spearman": 0.95},
        "errors": {mode: {"median": 0.05, "p90": 0.05} for mode in ("graph", "eager")},
        "groups": groups,
        "cases": cases,
        "notes": [],
        "environment": {"device": "a GPU"},
    }


@pytest.fixture(scope="session")
def page(
    made: SimpleNamespace, validation: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """report.html of all runs."""
    (made.folder / "validation.json").write_text(json.dumps(validation))
    out = tmp_path_factory.mktemp("report") / "report.html"
    arguments = ["report", str(made.folder), "--trace", made.trace, "--out", str(out)]
    assert run_command(arguments, debug=True) == 0
    return out

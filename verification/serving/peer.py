"""aiconfigurator's predictions of the measured rows, for the same deployments as ours.

It is installed from the package index into a virtual environment of its own, as it needs other
versions of what moesim needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from predict import Prediction
from rows import Row, deployment_of, speculation_of

from moesim.serving.engines import ENGINES

VERSION = "0.12.0"
RUNNER = Path(__file__).with_name("aiconfigurator_estimates.py")


def install(folder: Path) -> Path:
    """A virtual environment with aiconfigurator in `folder`; its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "-q", f"aiconfigurator=={VERSION}"]
    subprocess.run(command, check=True)
    return python


def query(row: Row) -> dict[str, Any]:
    """`cli_estimate`'s arguments: the row's deployment as `rows` reads it, batch per DP rank; the
    same drafts and acceptance where the recipe speculates."""
    deployment = deployment_of(row, ENGINES[row.engine])
    speculation = speculation_of(row)
    drafts: dict[str, Any] = {}
    if speculation is not None:
        accepted = round(float(speculation.expected()[-1]) - 1.0, 4)
        drafts = {"nextn": row.drafts, "nextn_accepted": accepted}
    return drafts | {
        "model_path": row.path,
        "system_name": row.system,
        "backend_name": row.engine,
        "isl": row.isl,
        "osl": row.osl,
        "batch_size": max(1, row.concurrency // row.dp),
        "tp_size": deployment.tp,
        "attention_dp_size": deployment.dp,
        "moe_tp_size": deployment.moe_tp,
        "moe_ep_size": deployment.ep,
    }


def ask(python: Path, queries: list[dict[str, Any]]) -> dict[str, Any]:
    """`version`, `rows` (the path of its measured rows) and `answers`, one per query."""
    command = [str(python), str(RUNNER)]
    done = subprocess.run(
        command, input=json.dumps(queries), stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def predictions(
    rows: list[Row], python: Path, cache: Path | None = None
) -> tuple[dict[int, Prediction], dict[str, int]]:
    """By row number, of the rows that it answers; and how often it gave which reason, or mode."""
    distinct: dict[str, dict[str, Any]] = {}
    for row in rows:
        distinct.setdefault(json.dumps(query(row)), query(row))
    known: dict[str, dict[str, Any]] = {}
    if cache is not None and cache.exists():
        known = json.loads(cache.read_text())
    missing = [key for key in distinct if key not in known]
    if missing:
        answers = ask(python, [distinct[key] for key in missing])["answers"]
        known |= dict(zip(missing, answers, strict=True))
        if cache is not None:
            cache.write_text(json.dumps(known))
    found: dict[int, Prediction] = {}
    said: dict[str, int] = {}
    for row in rows:
        answer = known[json.dumps(query(row))]
        said_of_it = answer.get("mode") or answer["error"]
        said[said_of_it] = said.get(said_of_it, 0) + 1
        if "mode" in answer:
            found[row.number] = Prediction(answer["ttft_ms"], answer["tpot_ms"])
    return found, said


def python_of(given: Path | None) -> Path:
    """The Python given, or that of a new temporary environment with aiconfigurator."""
    if given is not None:
        return given
    folder = Path(tempfile.mkdtemp(prefix="aiconfigurator-"))
    print(f"installing aiconfigurator {VERSION} into {folder}", file=sys.stderr)
    return install(folder)

"""moesim and aiconfigurator on the same measured rows, in one run: `python
verification/serving/against_peer.py --data ../shared/data/measured/serving_h100_h200_moe.csv --out
reports/serving-accuracy` installs aiconfigurator from the package index into a temporary
environment, reads all H100 and H200 rows of MoE models that it ships, and writes `peer.md` and
`peer.json`.

Both get the same deployment of every row (`rows`, `peer.query`). `--data` says which rows the
constants are fitted to; the others nobody fitted moesim to. Held out is as in `accuracy.py`. Rows
of runs with multi-token prediction, of which no acceptance is recorded, are predicted by both with
the same assumed one and listed apart too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from accuracy import fit_all, rounded
from peer import ask, predictions, python_of
from predict import NONE, Constants, Prediction, Predictor, errors
from rows import Row, read_rows, read_sample, refusal

from moesim.files import atomic_write
from moesim.serving.engines import ENGINES

OURS = ("kernels only", "held out", "shipped")
THEIRS = "aiconfigurator"
Predictions = Mapping[int, Prediction]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--python", type=Path, help="a Python that has aiconfigurator")
    parser.add_argument("--answers", type=Path, help="keep its answers here, and ask only once")
    args = parser.parse_args()
    python = python_of(args.python)
    about = ask(python, [])
    rows = read_sample(Path(about["rows"]))
    fitted = [r for r in read_rows(args.data) if not refusal(r, ENGINES[r.engine])]
    known = {row.measurement for row in read_rows(args.data)}
    usable = [row for row in rows if not refusal(row, ENGINES[row.engine])]
    predictor = Predictor()
    shipped, without = constants_of(args.out, predictor, fitted)
    held_out: dict[int, Prediction] = {}
    for group, constants in without.items():
        held_out |= predictor.predict_all([r for r in usable if r.group == group], constants)
    found: dict[str, Predictions] = {
        "kernels only": predictor.predict_all(usable, NONE),
        "held out": held_out,
        "shipped": predictor.predict_all(usable, shipped),
    }
    found[THEIRS], said = predictions(usable, python, args.answers)
    both = [row for row in usable if row.number in found[THEIRS]]
    sets: dict[str, list[Row]] = {
        "fitted to": [r for r in both if r.measurement in known and not r.drafts],
        "further": [r for r in both if r.measurement not in known and not r.drafts],
        "all but speculation": [r for r in both if not r.drafts],
        "speculation, acceptance assumed": [r for r in both if r.drafts],
        "all": both,
    }
    results = {
        "version": about["version"],
        "rows": len(rows),
        "answered_by_us": len(usable),
        "answered_by_both": len(both),
        "aiconfigurator_said": dict(sorted(said.items())),
        "constants": {engine: rounded(c) for engine, c in shipped.items()},
        "sets": {name: lines(chosen, found) for name, chosen in sets.items()},
        "further_once": lines(once(sets["further"]), found),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out / "peer.json", json.dumps(results, indent=1) + "\n")
    atomic_write(args.out / "peer.md", tables(results))
    print(tables(results))


def constants_of(
    out: Path, predictor: Predictor, fitted: list[Row]
) -> tuple[dict[str, Constants], dict[str, dict[str, Constants]]]:
    """Those that `accuracy.py` wrote into `out`, or fitted anew."""
    if (out / "results.json").exists():
        found = json.loads((out / "results.json").read_text())
        return found["constants"], found["constants_without"]
    shipped, without, _ = fit_all(predictor, fitted)
    return shipped, without


def once(rows: list[Row]) -> list[Row]:
    """Every measurement the first time that it is listed."""
    first: dict[tuple[float, float], Row] = {}
    for row in rows:
        first.setdefault(row.measurement, row)
    return list(first.values())


def lines(rows: list[Row], found: Mapping[str, Predictions]) -> list[dict[str, object]]:
    """Median and 90th percentile of |error| by engine and model, of every predictor."""
    groups: dict[tuple[str, str], list[Row]] = {("all", "all"): rows}
    for row in rows:
        for key in ((row.engine, "all"), (row.engine, row.group)):
            groups.setdefault(key, []).append(row)
    out: list[dict[str, object]] = []
    for (engine, model), members in sorted(groups.items()):
        if not members:
            continue
        line: dict[str, object] = {"engine": engine, "model": model, "rows": len(members)}
        for name in (*OURS, THEIRS):
            for figure, error in zip(("tpot", "ttft"), errors(members, found[name]), strict=True):
                size = np.abs(error)
                line[f"{name} {figure}"] = [
                    round(float(np.quantile(size, share)), 4) for share in (0.5, 0.9)
                ]
        out.append(line)
    return out


def tables(results: Mapping[str, object]) -> str:
    """The sets as Markdown: ours beside theirs."""
    names = [(figure, name) for figure in ("tpot", "ttft") for name in (*OURS, THEIRS)]
    head = "| engine | model | rows | " + " | ".join(f"{f.upper()} {n}" for f, n in names) + " |"
    sets: Mapping[str, list[dict[str, list[float]]]] = results["sets"]  # type: ignore[assignment]
    out = []
    cell: Callable[[list[float]], str] = lambda v: f"{100 * v[0]:.1f} / {100 * v[1]:.0f}%"  # noqa: E731
    for title, found in [*sets.items(), ("further, each once", results["further_once"])]:
        out += [f"**{title}**", "", head, "|---" * (3 + len(names)) + "|"]
        for line in found:  # type: ignore[attr-defined]
            cells = " | ".join(cell(line[f"{name} {figure}"]) for figure, name in names)
            out.append(f"| {line['engine']} | {line['model']} | {line['rows']} | {cells} |")
        out.append("")
    return "\n".join(out)


if __name__ == "__main__":
    main()

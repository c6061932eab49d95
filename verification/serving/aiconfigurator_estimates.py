"""What aiconfigurator says of serving rows; run by the Python that has it installed:
`python aiconfigurator_estimates.py < queries.json > estimates.json`.

A query is the arguments of `cli_estimate`, an answer {"ttft_ms", "tpot_ms", "mode"} or {"error"}.
Precisions are left to aiconfigurator to infer, versions too: it has its tables by its own names
of releases. Measured tables alone first ("SILICON"), "HYBRID" where they have not what is needed.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.resources import files
from typing import Any


def main() -> None:
    logging.disable(logging.CRITICAL)
    from aiconfigurator.cli.api import cli_estimate  # type: ignore[import-not-found]

    def estimate(query: dict[str, Any]) -> dict[str, Any]:
        error = ""
        for mode in ("SILICON", "HYBRID"):
            try:
                found = cli_estimate(**query, database_mode=mode)
            except Exception as failed:  # whatever it raises is its answer
                error = f"{type(failed).__name__}: {failed}"
            else:
                return {"ttft_ms": found.ttft, "tpot_ms": found.tpot, "mode": mode}
        return {"error": " ".join(error.split())[:200]}

    answers = []
    queries = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):
        for i, query in enumerate(queries):
            answers.append(estimate(query))
            if i % 50 == 0:
                print(f"{i} of {len(queries)}", file=sys.stderr, flush=True)
    rows = files("aiconfigurator_core") / "systems" / "silicon_sample.csv"
    found = {"version": version("aiconfigurator"), "rows": str(rows), "answers": answers}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

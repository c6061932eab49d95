"""One call on the GPU machine: models one after the other, imports of all at once.

    python run.py FOLDER OUT [--smoke] MODEL[@CASE,CASE][!OPTION]:SECONDS:LIMIT ...
    python run.py FOLDER OUT parts[@PART=SECONDS,...]:0:LIMIT ...

Logs go to /tmp/logs. OPTION: of study.py, without its dashes.

SECONDS: the budget for cases once the engine is up; LIMIT: the process is ended after so many.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    """Start all, let them go in turn, print the end of each log."""
    smoke = ["--smoke"] if "--smoke" in sys.argv else []
    folder, out, *jobs = (a for a in sys.argv[1:] if a != "--smoke")
    here = Path(__file__).resolve().parent
    started, started_at = [], time.time()
    Path("/tmp/logs").mkdir(exist_ok=True)
    for job in jobs:
        model, budget, limit = job.split(":")
        model, _, option = model.partition("!")
        model, _, only = model.partition("@")
        turn = Path(f"/tmp/turn.{model}.{time.time()}")
        log = Path("/tmp/logs") / f"{model}.log"
        command = [sys.executable, str(here / "study.py"), folder, model, f"{out}/{model}.json"]
        command += ["--budget", budget, "--turn", str(turn), "--only", only, *smoke]
        command += [f"--{option}"] if option else []
        if model == "parts":
            command = [sys.executable, str(here / "parts.py"), f"{out}/parts.json", *smoke]
            command += ["--turn", str(turn), "--budget", only]
        if model == "ranks":
            command = [sys.executable, str(here / "ranks.py"), folder, f"{out}/ranks.json"]
            command += ["--turn", str(turn)]
        with log.open("w") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        started.append((model, process, turn, float(limit), log))
    for model, process, turn, limit, log in started:
        began = time.time()
        turn.touch()
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            code = -9
        print(f"== {model}: exit {code} after {time.time() - began:.0f} s", flush=True)
        lines = log.read_text(errors="replace").splitlines()
        words = ("DONE", "END", "ERROR", "CHECK", "GPU KV cache size", "Available KV")
        print(f"   at {time.time() - started_at:.0f} s", flush=True)
        shown = [x[:260] for x in lines if any(w in x for w in words)]
        print("\n".join(shown[-12:] if code == 0 else shown[-6:] + lines[-15:]), flush=True)


if __name__ == "__main__":
    main()

"""One call on the machine with two GPUs: jobs in turn, imports of all at once.

    python two_run.py FOLDER OUT JOB:LIMIT[:BUDGET] ...

JOB: MODEL-dp, MODEL-tp, MODEL-dp+ or MODEL-tp+ (redundant slots), MODEL-dp++ (and the balancer
moving experts), kernels=MODEL,MODEL/MODEL,MODEL (models of GPU 0 / GPU 1); "!" behind: a short
run. LIMIT: seconds, then the job is ended; BUDGET: seconds for its cases. After each job all
records so far go into OUT/records.tar.gz.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

RECORDS, LOGS = Path("/tmp/records"), Path("/tmp/logs")
WORDS = ("DONE", "END", "ERROR", "CHECK", "UP ", "GPU KV cache size", "Error")


def commands(folder: str, job: str, budget: str, turn: Path) -> list[tuple[str, list[str], str]]:
    """(name, command, GPUs) of a job's processes."""
    here = Path(__file__).resolve().parent
    if job.startswith("kernels="):
        found = []
        for gpu, models in enumerate(job.removeprefix("kernels=").split("/")):
            out = RECORDS / f"kernels.{gpu}.json"
            command = [str(here / "two_kernels.py"), folder, str(out), *models.split(",")]
            found.append(
                (f"kernels.{gpu}", [*command, "--turn", str(turn), "--budget", budget], str(gpu))
            )
        return found
    model, _, mode = job.rstrip("!").rpartition("-")
    command = [
        str(here / "two_gpus.py"),
        folder,
        model,
        mode.rstrip("+"),
        str(RECORDS / job.rstrip("!")),
    ]
    command += ["--turn", str(turn), "--budget", budget]
    command += ["--redundant"] * mode.endswith("+") + ["--balancer"] * mode.endswith("++")
    return [(job, command + ["--smoke"] * job.endswith("!"), "0,1")]


def pack(out: str) -> None:
    """All records and logs so far."""
    with tarfile.open(f"{out}/records.tar.gz.part", "w:gz", compresslevel=6) as tar:
        for path in (*RECORDS.iterdir(), *LOGS.iterdir()):
            tar.add(path, arcname=f"{path.parent.name}/{path.name}")
    Path(f"{out}/records.tar.gz.part").replace(f"{out}/records.tar.gz")


def wait_for_memory() -> None:
    """Until ended processes have given back what they held on the GPUs, at most 15 s."""
    ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    for _ in range(30):
        used = subprocess.run(ask, capture_output=True, text=True).stdout.split()
        if max([int(u) for u in used if u.isdigit()], default=0) < 3000:
            return
        time.sleep(0.5)


def main() -> None:
    """Start all, let them go in turn, print the end of each log."""
    folder, out, *jobs = sys.argv[1:]
    for path in (RECORDS, LOGS, Path(out)):
        path.mkdir(exist_ok=True)
    began, waiting = time.time(), []
    for number, job in enumerate(jobs):
        name, limit, budget, *_ = (*job.split(":"), "1000000")
        turn = Path(f"/tmp/turn.{number}.{time.time()}")
        processes = []
        for label, command, gpus in commands(folder, name, budget, turn):
            log = LOGS / f"{label}.log"
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus}
            with log.open("w") as stream:
                made = subprocess.Popen(
                    [sys.executable, *command],
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            processes.append((label, made, log))
        waiting.append((turn, float(limit), processes))
    for turn, limit, processes in waiting:
        wait_for_memory()
        start = time.time()
        turn.touch()
        for label, process, log in processes:
            try:
                code = process.wait(timeout=max(1.0, limit - (time.time() - start)))
            except subprocess.TimeoutExpired:
                code = -9
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            print(f"== {label}: exit {code}, {time.time() - start:.0f} s", flush=True)
            lines = log.read_text(errors="replace").splitlines()
            shown = [x[:200] for x in lines if any(w in x for w in WORDS)]
            more = [] if code == 0 else [x[:240] for x in lines[-25:]]
            print("\n".join(shown[-8:] + more), flush=True)
        pack(out)
    print(f"all: {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()

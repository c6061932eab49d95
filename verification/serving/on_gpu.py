"""On the GPU machine: start the server with the script that `moesim recommend --out` wrote, run the
benchmark that it wrote, at its rate and at others.

    python on_gpu.py FOLDER REPLAY OUT NAME RATE:SECONDS,RATE:SECONDS,... [SERVE OPTION ...]

FOLDER: recommend's; REPLAY: what `moesim engine replay` wrote for the same model (dummy weights,
its environment puts the trace's routing in place of the router). The scripts run as they are; what
this machine needs is added by a stand-in for the command `vllm` and printed as "changed": `serve`
gets `--load-format dummy` and the options given; a benchmark's counted run gets its rate, how many
requests, and where its result goes. A tokenizer of one token per word is written where there is
none.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

STAND_IN = """#!/usr/bin/env python3
import os, shlex, sys
args = sys.argv[1:]
if args[0] == "serve":
    args += shlex.split(os.environ["MORE_SERVE"])
elif "--save-result" in args:
    at = args.index("--result-filename")
    args = args[:at] + args[at + 2:] + shlex.split(os.environ["MORE_BENCH"])
elif os.environ["WARM"] == "0":
    sys.exit(0)
os.execvp(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", *args])
"""
UP_S = 300


def tokenizer(folder: Path) -> None:
    """A word for every token of the model, "t5" for 5."""
    if (folder / "tokenizer.json").exists():
        return
    from tokenizers import Tokenizer, models, pre_tokenizers

    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = {"<unk>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, size)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "eos_token": "<eos>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


def get(port: str, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return answer.read().decode()


def wait(server: subprocess.Popen, port: str) -> float:
    """Seconds until the server answers; raises RuntimeError where it does not."""
    began = time.time()
    while time.time() - began < UP_S:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            get(port, "/health")
            return time.time() - began
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("the server did not come up")


def metrics(port: str) -> dict[str, float]:
    """The engine's counters, without labels."""
    found: dict[str, float] = {}
    for line in get(port, "/metrics").splitlines():
        match = re.match(r"(vllm:[a-z_]+(?:_sum|_count|_total|_perc)?)(?:\{.*\})? (\S+)$", line)
        if match and "_bucket" not in line and "_created" not in line:
            found[match[1]] = found.get(match[1], 0.0) + float(match[2])
    return found


def main() -> None:
    """One server, every rate; the log and the results in OUT."""
    folder, replay, out, name, plan, *more = sys.argv[1:]
    out, replay, folder = Path(out), Path(replay), Path(folder)
    script = (folder / "serving.sh").read_text()
    port = re.search(r"--port (\d+)", script)[1]
    tokenizer(replay / "model")
    stand_in = Path("/tmp/stand-in/vllm")
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    env = dict(os.environ, PATH=f"{stand_in.parent}:{os.environ['PATH']}", WARM="1")
    for line in (replay / "launch.sh").read_text().splitlines():
        if line.startswith("export "):
            key, _, value = line.removeprefix("export ").partition("=")
            env[key] = value
    env["MORE_SERVE"] = " ".join(["--load-format dummy", *more])
    print("changed: serve", env["MORE_SERVE"], flush=True)
    try:
        get(port, "/health")
        raise SystemExit(f"a server answers on port {port} already: end it first")
    except OSError:
        pass
    log = (out / f"{name}.server.log").open("w")
    server = subprocess.Popen(
        ["bash", str(folder / "serving.sh")],
        env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    record: dict[str, object] = {"name": name, "changed": env["MORE_SERVE"], "runs": {}}
    try:
        record["up_s"] = wait(server, port)
        smi = ["nvidia-smi", "--query-gpu=memory.used,driver_version", "--format=csv,noheader"]
        record["memory_used"] = subprocess.run(smi, capture_output=True, text=True).stdout
        print("UP", record["up_s"], record["memory_used"], flush=True)
        for item in plan.split(","):
            rate, seconds = item.split(":")
            file = out / f"{name}-{rate}.json"
            count = max(100, round(float(rate) * float(seconds)))
            env["MORE_BENCH"] = (
                f"--request-rate {rate} --num-prompts {count} --result-filename {file}"
                " --disable-tqdm --save-detailed"
            )
            began, before = time.time(), metrics(port)
            with (out / f"{name}.bench.log").open("a") as said:
                done = subprocess.run(
                    ["bash", str(folder / "bench.sh")],
                    env=env, stdout=said, stderr=subprocess.STDOUT, cwd=out, timeout=280,
                )  # fmt: skip
            after = metrics(port)
            took = {k: v - before.get(k, 0.0) for k, v in after.items() if v != before.get(k)}
            record["runs"][rate] = {"rc": done.returncode, "metrics": took}
            if file.exists():
                kept = compact(json.loads(file.read_text()))
                file.write_text(json.dumps(kept))
                print(
                    "RATE",
                    rate,
                    json.dumps({k: v for k, v in kept.items() if not isinstance(v, (list, str))}),
                    flush=True,
                )
            print("DONE", rate, done.returncode, round(time.time() - began, 1), "s", flush=True)
            env["WARM"] = "0"
    except Exception as error:
        print("ERROR", repr(error)[:500], flush=True)
    finally:
        (out / f"{name}.record.json").write_text(json.dumps(record))
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
        lines = (out / f"{name}.server.log").read_text(errors="replace").splitlines()
        words = ("KV cache", "ERROR", "Error", "cudagraph", "Using", "backend", "took")
        print("\n".join(x[:230] for x in [x for x in lines if any(w in x for w in words)][-25:]))
        if "up_s" not in record:
            print("\n".join(x[:300] for x in lines[-30:]), flush=True)


def compact(result: dict) -> dict:
    """The tool's own result; of the lists of --save-detailed those of times, without texts."""
    drop = ("generated_texts", "errors", "itls", "input_lens", "output_lens")
    kept = {k: v for k, v in result.items() if k not in drop}
    for key in ("ttfts", "start_times"):
        if isinstance(kept.get(key), list):
            kept[key] = [round(x, 5) for x in kept[key]]
    if "itls" in result:
        kept["request_itl_s"] = [round(sum(x), 4) for x in result["itls"]]
    return kept


if __name__ == "__main__":
    main()

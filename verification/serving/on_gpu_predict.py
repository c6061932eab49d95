"""What moesim says, before it is measured, of the server that `recommend`'s scripts start.

    python verification/serving/on_gpu_predict.py OUT.json NAME=FOLDER:RATE,RATE,... ...

FOLDER: what `moesim recommend --out` wrote. At each rate, prompts and outputs of the fixed lengths
that bench.sh sends: latencies with the answer's engine profile, and with the host that
reports/engine-vllm measured; the KV cache in tokens, and the GPU's memory.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from moesim.serving.engines import engine_profile
from moesim.serving.memory import gpu_memory
from moesim.studies.recommend.measured import Benchmark, _deployed
from moesim.studies.recommend.refit import with_engine

HOST = Path(__file__).resolve().parents[2] / "reports/engine-vllm/host.yaml"
FIGURES = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "output_tokens_per_s")


def predicted(folder: Path, rate: float) -> dict[str, object]:
    """Figures by profile; memory of one GPU of the first role."""
    asked = json.loads((folder / "recommendation.json").read_text())["asked"]
    benchmark = Benchmark(rate, 0, asked["prompt_tokens"], asked["output_tokens"], {})
    bench, layout = _deployed(folder, benchmark)
    out: dict[str, object] = {"layout": layout.name}
    for name, one in (("vllm", bench), ("host", with_engine(bench, engine_profile(str(HOST))))):
        tried = one.run(layout, rate)
        found = {key: tried.figures.get(key) for key in FIGURES}
        out[name] = found | {"overloaded": tried.overloaded}
    memory = gpu_memory(bench.engine(layout.front)[0])
    return out | {"kv_tokens": memory.kv_token_capacity, "memory": asdict(memory)}


def main() -> None:
    """All folders and rates."""
    out, *cases = sys.argv[1:]
    found = {}
    for case in cases:
        name, _, rest = case.partition("=")
        folder, _, rates = rest.rpartition(":")
        found[name] = {rate: predicted(Path(folder), float(rate)) for rate in rates.split(",")}
        print(name, json.dumps(found[name]), flush=True)
    Path(out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What moesim says, before it is measured, of the server that `recommend`'s scripts start.

    python verification/serving/on_gpu_predict.py OUT.json NAME=FOLDER:RATE,...[@BUDGET,...] ...

FOLDER: what `moesim recommend --out` wrote. At each rate, prompts and outputs of the fixed lengths
that bench.sh sends: latencies with the answer's engine profile, and with the host that
reports/engine-vllm measured; the KV cache in tokens, and the GPU's memory. With budgets, the same
for each of these numbers of tokens of a step, instead of the answer's.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from moesim.serving.engines import engine_profile
from moesim.serving.memory import gpu_memory
from moesim.studies.recommend.deployed import deployed
from moesim.studies.recommend.refit import with_engine

HOST = Path(__file__).resolve().parents[2] / "reports/engine-vllm/host.yaml"
FIGURES = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "output_tokens_per_s")


def predicted(folder: Path, rate: float, budget: int = 0) -> dict[str, object]:
    """Figures by profile; memory of one GPU of the first role. budget: tokens of a step, 0 for the
    answer's."""
    asked = json.loads((folder / "recommendation.json").read_text())["asked"]
    bench, layout = deployed(folder, rate, asked["prompt_tokens"], asked["output_tokens"])
    if budget:
        layout = replace(layout, front=replace(layout.front, budget=budget))
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
    found: dict[str, dict[str, object]] = {}
    for case in cases:
        name, _, rest = case.partition("=")
        folder, _, rates = rest.rpartition(":")
        rates, _, budgets = rates.partition("@")
        for rate in rates.split(","):
            for budget in budgets.split(","):
                key = f"{rate}@{budget}" if budget else rate
                one = predicted(Path(folder), float(rate), int(budget or 0))
                found.setdefault(name, {})[key] = one
        print(name, json.dumps(found[name]), flush=True)
    Path(out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

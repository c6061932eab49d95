"""Rows that vLLM adds to a decode batch to reach the size of a CUDA graph; the model's own router.

    python padding.py FOLDER OUT.json

FOLDER: what prepare.py wrote, or `moesim engine replay`'s folder named qwen3-30b. Dummy weights,
no replayed routing: steps of batches between two sizes of graphs, with what vLLM leaves in the
added rows ("stale") and with one token in all of them ("one token"); and prefill steps, to see what
the replay's own work on the host was worth.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cases
from cases import MODELS, Case

SIZES = [1, 2, 4, *range(8, 257, 8), 384, 512]
BATCHES = (8, 9, 10, 12, 15, 16, 17, 20, 24, 25, 32, 33, 40, 57, 64, 121, 128, 249, 256, 512)
PREFILLS = tuple(
    Case("prefill", n, p) for n, p in ((1, 512), (1, 1024), (2, 1024), (4, 1024), (8, 1024))
)
ROUNDS, STEPS, WARM = 6, 8, 2


def decode(engine, case: Case) -> list:
    """[fill, round, wall ms of the steps, [gpu, host] ms of the passes]."""
    import numpy as np
    import torch

    names = engine.add(case, 400)
    for _ in range(-(-case.requests * case.prompt // cases.MAX_BATCH_TOKENS) + 3):
        engine.engine.step()
    padded = min(s for s in SIZES if s >= case.requests)
    ids = engine.runner.input_ids
    ids = getattr(ids, "gpu", ids)
    left = ids[case.requests : padded].clone()
    rows = []
    for number in range(ROUNDS):
        for fill in ("stale", "one token") if padded > case.requests else ("stale",):
            torch.cuda.synchronize()
            if fill == "stale":
                ids[case.requests : padded] = left
            else:
                ids[case.requests : padded] = 7
            engine.events.clear()
            marks = [time.perf_counter()]
            for _ in range(STEPS):
                engine.engine.step()
                marks.append(time.perf_counter())
            walls = (np.diff(marks) * 1e3)[WARM:]
            rows.append([fill, number, [round(float(w), 4) for w in walls], engine.gpu_ms()[WARM:]])
    engine.engine.abort_request(names)
    engine.drain()
    return rows


def main() -> None:
    """One start, all cases."""
    from study import Engine, prefill

    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    import os

    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_ALLOW_INSECURE_SERIALIZATION="1")
    cases.GRAPHS["padding"] = SIZES
    model = replace(MODELS["qwen3-30b"], set="padding")
    engine = Engine(folder, model, None)
    print("UP", engine.up_s, flush=True)
    record: dict[str, object] = {"up_s": engine.up_s, "memory": engine.memory()}
    record["decode"], record["prefill"] = {}, {}

    class Still:
        def swap(self, _: object) -> None:
            pass

    try:
        for case in PREFILLS:
            found = prefill(engine, Still(), {"own": None}, case, 10)
            record["prefill"][case.key] = found["rows"]
        for n in BATCHES:
            record["decode"][n] = decode(engine, Case("decode", n, 512))
            print("DONE", n, flush=True)
    finally:
        out.write_text(json.dumps(record))


if __name__ == "__main__":
    main()

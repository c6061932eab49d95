"""What a layer's kernels take in vLLM, on one GPU: products, attention, small kernels, experts.

    python parts.py OUT.json [--budget gemm=20,small=20,...] [--turn FILE] [--smoke]

Every point is a CUDA graph of calls, each with weights or a cache of its own, so that none finds
them in the L2 cache; what the kernel before has just written (rows of a small step) may be there,
as in a model. Graphs are replayed back to back, ten times after a warm-up. "held": the same after
the GPU has done nothing else for HELD_MS, as in a step with many prompt tokens; the clock and the
power that the driver reports meanwhile are in the record. Written after every part.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import part_calls
import torch
from part_pool import Pool

ROUNDS = 10
HELD_MS = 100.0


Call = Callable[[], Any]


class Clock(threading.Thread):
    """Clock (MHz) and power (W) of the GPU every 20 ms, from the driver."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.rows: list[list[float]] = []

    def run(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        index = int(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or 0)
        gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
        while True:
            mhz = pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM)
            watts = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3
            self.rows.append([round(time.time(), 3), mhz, round(watts, 1)])
            time.sleep(0.02)

    def since(self, began: float) -> list[float]:
        """Median clock and power since a time, 0 where none was read."""
        rows = [r for r in list(self.rows) if r[0] >= began]
        if not rows:
            return [0.0, 0.0]
        return [sorted(r[i] for r in rows)[len(rows) // 2] for i in (1, 2)]


def captured(calls: list[Call]) -> torch.cuda.CUDAGraph:
    """The calls as one graph, warmed up."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    graph.kept = (kept, calls)  # type: ignore[attr-defined]
    graph.replay()
    torch.cuda.synchronize()
    return graph


def timed(graph: torch.cuda.CUDAGraph, calls: int, rounds: int) -> list[float]:
    """Microseconds per call in every round, replays back to back."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 2)]
    for mark in marks:
        mark.record()
        graph.replay()
    torch.cuda.synchronize()
    pairs = pairwise(marks[1:])
    return [round(a.elapsed_time(b) / calls * 1e3, 3) for a, b in pairs]


class Bench:
    """Times points and keeps them: [kernel, sizes, calls, us, held us, MHz, W]."""

    def __init__(self, rounds: int, clock: Clock) -> None:
        self.rounds, self.clock = rounds, clock
        self.points: list[list[Any]] = []
        self.errors: list[str] = []

    def add(self, kernel: str, sizes: list[Any], calls: list[Call], held: bool) -> None:
        """One point; an error is kept and the rest goes on."""
        try:
            graph = captured(calls)
            time.sleep(0.005)
            short = timed(graph, len(calls), self.rounds)
            long, state = [], [0.0, 0.0]
            if held:
                one = sum(short) / len(short) * len(calls) / 1e3
                began = time.time()
                for _ in range(int(HELD_MS / one) + 1):
                    graph.replay()
                long = timed(graph, len(calls), self.rounds)
                state = self.clock.since(began + HELD_MS / 2e3)
            self.points.append([kernel, sizes, len(calls), short, long, *state])
            del graph
        except Exception as error:
            torch.cuda.synchronize()
            self.errors.append(f"{kernel} {sizes}: {error!r}"[:300])
            if len(self.errors) < 12:
                print("ERROR", self.errors[-1], flush=True)


def main() -> None:
    """All parts within their budgets."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget", default="", help="PART=SECONDS,...")
    parser.add_argument("--turn", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    from vllm.config import VllmConfig, set_current_vllm_config

    part_calls.load()
    while args.turn and not args.turn.exists():
        time.sleep(0.1)
    budgets = dict(b.split("=") for b in args.budget.split(",") if b)
    clock = Clock()
    clock.start()
    record: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "columns": ["kernel", "sizes", "calls", "us", "held_us", "mhz", "watts"],
        "parts": {},
    }
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        pool = Pool(8e9 if args.smoke else 34e9)
        for name, points in part_calls.PARTS.items():
            bench = Bench(2 if args.smoke else ROUNDS, clock)
            began, left = time.time(), 0
            limit = float(budgets.get(name, 1e9))
            made: Iterator[Any] = points(pool)
            for number, (kernel, sizes, calls, held) in enumerate(made):
                if time.time() - began > limit or (args.smoke and number % 23):
                    left += 1
                    continue
                bench.add(kernel, sizes, calls(), held)
                if number % 40 == 0:
                    record["parts"][name] = {"points": bench.points}
                    args.out.write_text(json.dumps(record))
            record["parts"][name] = {"points": bench.points, "errors": bench.errors, "left": left}
            args.out.write_text(json.dumps(record))
            spent = round(time.time() - began, 1)
            print("DONE", name, len(bench.points), "points", left, "left,", spent, "s", flush=True)
            torch.cuda.empty_cache()
    record["clock"] = clock.rows[:: max(1, len(clock.rows) // 4000)]
    args.out.write_text(json.dumps(record))
    print("END parts", flush=True)


if __name__ == "__main__":
    main()

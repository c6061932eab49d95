"""Steps of a whole model inside vLLM, one process per model, on the GPU machine.

    python study.py FOLDER MODEL OUT.json [--budget SECONDS] [--turn FILE] [--only CASE,...]
        [--start] [--paused] [--no-profile] [--smoke]

FOLDER: what prepare.py wrote. The engine runs in this process, so that a step's wall time and GPU
time are seen together. Prefill: whole prompts in one step. Decode: sequences are prefilled once,
then rounds of every routing are interleaved while they go on; the routing is changed in place, so
the CUDA graphs captured at start replay all of them. --start: start and check, no steps. --paused:
prefill also with a rest before every step. Written after every case.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np
from cases import (
    CASES,
    DECODE,
    GRAPHS,
    LATER_DECODE,
    LATER_PREFILL,
    MAX_BATCH_TOKENS,
    MAX_MODEL_LEN,
    MAX_SEQUENCES,
    MEMORY_FRACTION,
    MODELS,
    PREFILL,
    ROUNDS,
    ROUTINGS_OF,
    STEPS,
    WARM_STEPS,
    Case,
)
from parts import Clock

EAGER_STEPS = 5
EAGER_ROUNDS = 3
PAUSED_ROUNDS, PAUSE_S = 4, 0.4
PROFILED = (PREFILL[5], DECODE[3], DECODE[5], DECODE[7])


def variants(content):
    """The content under every routing of the study, same shapes."""
    rng = np.random.default_rng(0)
    layers, tokens, k = content.table.shape
    uniform = np.empty_like(content.table)
    for layer in range(layers):
        noise = rng.random((tokens, content.num_experts), dtype=np.float32)
        uniform[layer] = np.argpartition(noise, k, axis=1)[:, :k]
    same = np.broadcast_to(np.arange(k, dtype=content.table.dtype), content.table.shape)
    return {
        "trace": content,
        "uniform": replace(content, table=uniform),
        "same": replace(content, table=np.ascontiguousarray(same)),
    }


class Engine:
    """The LLM, its worker, and the clock of its steps."""

    def __init__(self, folder: Path, model, turn: Path | None) -> None:
        from vllm import LLM, SamplingParams
        from vllm.engine.arg_utils import EngineArgs

        self.sampling = SamplingParams
        config = {"mode": 3 if model.compile else 0, "cudagraph_capture_sizes": GRAPHS[model.set]}
        if not model.compile:
            config["cudagraph_mode"] = "FULL_DECODE_ONLY"
        kwargs = {
            "model": str(folder / model.key),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "max_model_len": MAX_MODEL_LEN,
            "max_num_batched_tokens": MAX_BATCH_TOKENS,
            "max_num_seqs": MAX_SEQUENCES,
            "gpu_memory_utilization": MEMORY_FRACTION,
            "enable_prefix_caching": False,
            "seed": 0,
            "kernel_config": {"moe_backend": "triton", "enable_flashinfer_autotune": False},
            "compilation_config": config,
            "worker_extension_cls": "moesim.engine.vllm.WorkerExtension",
        }
        EngineArgs(**kwargs).create_engine_config()  # fills vLLM's cache of model classes
        while turn and not turn.exists():
            time.sleep(0.1)
        self.began = time.time()
        self.llm = LLM(**kwargs)
        self.up_s = time.time() - self.began
        self.engine = self.llm.llm_engine
        found = []
        self.llm.collective_rpc(lambda worker: found.append(worker))
        self.worker = found[0]
        self.worker = getattr(self.worker, "worker", self.worker)
        self.runner = self.worker.model_runner
        self.vocab = self.runner.model_config.get_vocab_size()
        self.number = 0
        self.rng = np.random.default_rng(1)
        self.clock = Clock()
        self.clock.start()
        self._time_gpu()

    def _time_gpu(self) -> None:
        """Events before a pass's first and after its last kernel."""
        import torch

        self.events = []
        run = self.runner.execute_model

        def timed(*args, **kwargs):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            began = time.perf_counter()
            out = run(*args, **kwargs)
            last.record()
            self.events.append((first, last, time.perf_counter() - began))
            return out

        self.runner.execute_model = timed

    def gpu_ms(self) -> list[tuple[float, float]]:
        """(GPU ms, host ms) of every pass since the last call."""
        import torch

        torch.cuda.synchronize()
        times = [(a.elapsed_time(b), host * 1e3) for a, b, host in self.events]
        self.events.clear()
        return times

    def add(self, case: Case, new_tokens: int) -> list[str]:
        """Queue a case's requests."""
        names = []
        for _ in range(case.requests):
            self.number += 1
            tokens = self.rng.integers(10, self.vocab - 10, case.prompt).tolist()
            params = self.sampling(
                temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
            )
            name = str(self.number)
            self.engine.add_request(name, {"prompt_token_ids": tokens}, params)
            names.append(name)
        return names

    def drain(self) -> int:
        """Step until nothing is left; the number of calls."""
        calls = 0
        while self.engine.has_unfinished_requests():
            self.engine.step()
            calls += 1
        return calls

    def memory(self) -> dict[str, object]:
        """What the engine knows of its memory, bytes."""
        import torch

        cache = self.engine.vllm_config.cache_config
        worker = self.worker
        return {
            "total": torch.cuda.mem_get_info()[1],
            "free_now": torch.cuda.mem_get_info()[0],
            "weights": int(self.runner.model_memory_usage),
            "peak_activation": int(getattr(worker, "peak_activation_memory", -1)),
            "non_torch": int(getattr(worker, "non_torch_memory", -1)),
            "graphs_estimate": int(getattr(worker, "cudagraph_memory_estimate", -1)),
            "kv_cache": int(getattr(worker, "available_kv_cache_memory_bytes", -1)),
            "requested": int(getattr(worker, "requested_memory", -1)),
            "num_gpu_blocks": cache.num_gpu_blocks,
            "block_size": cache.block_size,
            "max_concurrency": str(getattr(cache, "kv_cache_max_concurrency", "")),
            "kv_tokens": str(getattr(cache, "kv_cache_size_tokens", "")),
        }


def prefill(engine: Engine, replay, contents, case: Case, rounds: int, pause: float = 0.0) -> dict:
    """Rounds of one prefill step, routings interleaved."""
    import torch

    rows = []
    for number in range(-1, rounds):
        for routing in contents:
            replay.swap(contents[routing])
            engine.add(case, 1)
            torch.cuda.synchronize()
            engine.events.clear()
            time.sleep(pause)
            seen, began = time.time(), time.perf_counter()
            calls = engine.drain()
            torch.cuda.synchronize()
            wall = (time.perf_counter() - began) * 1e3
            passes = engine.gpu_ms()
            if number >= 0:
                rows.append([number, routing, wall, calls, passes, *engine.clock.since(seen)])
    columns = ["round", "routing", "wall_ms", "calls", "[gpu_ms, host_ms]", "mhz", "watts"]
    return {"columns": columns, "rows": rows}


def decode(engine: Engine, replay, contents, case: Case, rounds: int) -> dict:
    """One prefill, then decode steps: every routing with CUDA graphs, the trace without too."""
    import torch

    replay.swap(contents["trace"])
    names = engine.add(case, MAX_MODEL_LEN - case.prompt)
    tokens = case.requests * case.prompt
    began = time.perf_counter()
    for _ in range(-(-tokens // MAX_BATCH_TOKENS) + 3):
        engine.engine.step()
    torch.cuda.synchronize()
    prefill_s = time.perf_counter() - began
    dispatcher = engine.runner.cudagraph_dispatcher
    rows = []
    ways = [(r, "graph", STEPS) for r in contents] + [("trace", "eager", EAGER_STEPS)]
    for number in range(rounds):
        for routing, mode, steps in ways:
            if mode == "eager" and number >= EAGER_ROUNDS:
                continue
            torch.cuda.synchronize()
            replay.swap(contents[routing])
            dispatcher.keys_initialized = mode == "graph"
            engine.events.clear()
            marks = [time.perf_counter()]
            for _ in range(steps):
                engine.engine.step()
                marks.append(time.perf_counter())
            walls = (np.diff(marks) * 1e3)[WARM_STEPS:]
            passes = engine.gpu_ms()[WARM_STEPS:]
            rows.append([number, routing, mode, [round(float(w), 4) for w in walls], passes])
    dispatcher.keys_initialized = True
    engine.engine.abort_request(names)
    engine.drain()
    columns = ["round", "routing", "mode", "wall_ms", "[gpu_ms, host_ms]"]
    return {"columns": columns, "prefill_s": prefill_s, "rows": rows}


def profile(engine: Engine, replay, contents, case: Case, before: int = 0) -> tuple[list, list]:
    """[kernel, microseconds, launches] of one prefill step or three decode steps; and what lies
    between the first kernel's start and the last one's end: [all, with a kernel running]. before:
    prefill steps right before it, so that the GPU is as warm as in the rounds."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    replay.swap(contents["trace"])
    for _ in range(before):
        engine.add(case, 1)
        engine.drain()
    names = engine.add(case, 1 if case.phase == "prefill" else 200)
    if case.phase == "decode":
        for _ in range(-(-case.requests * case.prompt // MAX_BATCH_TOKENS) + 6):
            engine.engine.step()
    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        if case.phase == "prefill":
            engine.drain()
        else:
            for _ in range(3):
                engine.engine.step()
        engine.gpu_ms()
    engine.engine.abort_request(names)
    engine.drain()
    rows = [[e.key[:160], round(e.device_time_total, 2), e.count] for e in found.key_averages()]
    times = [e.time_range for e in found.events() if e.device_type == DeviceType.CUDA]
    spans = sorted((t.start, t.end) for t in times)
    busy, last = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    return sorted((r for r in rows if r[1] > 0), key=lambda r: -r[1])[:40], [
        round(last - spans[0][0], 1),
        round(busy, 1),
    ]


def check(engine: Engine, replay, contents) -> dict:
    """INV-1: a run of prefills and decodes with counting on, every routing."""
    found = {}
    for routing in contents:
        replay.swap(contents[routing])
        replay.counting = True
        engine.add(Case("prefill", 5, 300), 20)
        engine.add(Case("prefill", 2, 3000), 7)
        engine.drain()
        found[routing] = replay.check()
        replay.counting = False
    return found


def main() -> None:
    """All cases within the budget."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds once the engine is up")
    parser.add_argument("--turn", type=Path, help="wait for this file before using the GPU")
    parser.add_argument("--only", default="", help="keys of cases, between commas")
    parser.add_argument("--start", action="store_true")
    parser.add_argument("--paused", action="store_true")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    model = MODELS[args.model]
    os.environ.update(
        MOESIM_REPLAY=str(args.folder / f"{model.key}.replay.npz"),
        VLLM_MOE_ROUTING_SIMULATION_STRATEGY="moesim_replay",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
    )
    import torch
    import vllm.entrypoints.llm
    import vllm.v1.worker.gpu_worker

    engine = Engine(args.folder, model, args.turn)
    from moesim.engine.vllm_hooks import current

    config = engine.engine.vllm_config
    record = {
        "model": model.key,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "up_s": engine.up_s,
        "async_scheduling": str(config.scheduler_config.async_scheduling),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "attention": str({g.backend.__name__ for x in engine.runner.attn_groups for g in x}),
        "memory": engine.memory(),
        "cases": {},
    }
    print("UP", json.dumps(record), flush=True)
    replay = current()
    contents = {r: c for r, c in variants(replay.content).items() if r in ROUTINGS_OF[model.set]}
    record["check"] = check(engine, replay, contents)
    print("CHECK", json.dumps(record["check"]), flush=True)
    began = time.time()
    rounds = 2 if args.smoke else ROUNDS
    cases = (PREFILL[1:2] + DECODE[1:2]) if args.smoke else CASES[model.set]
    if args.only:
        cases = [c for c in cases if c.key in args.only.split(",")]
    if args.start:
        cases = []
    for case in cases:
        left = args.budget - (time.time() - began)
        if left < 0:
            record.setdefault("left_out", []).append(case.key)
            continue
        start = time.time()
        measure = prefill if case.phase == "prefill" else decode
        try:
            record["cases"][case.key] = measure(engine, replay, contents, case, rounds)
            if args.paused and case.phase == "prefill":
                paused = prefill(engine, replay, contents, case, PAUSED_ROUNDS, PAUSE_S)
                record["cases"][case.key]["paused"] = paused["rows"]
        except Exception as error:
            record["cases"][case.key] = {"error": repr(error)[:500]}
            print("ERROR", case.key, repr(error)[:500], flush=True)
            break
        finally:
            args.out.write_text(json.dumps(record))
        print("DONE", model.key, case.key, round(time.time() - start, 1), "s", flush=True)
    profiled = {"first": PROFILED, "later": (LATER_PREFILL[4], LATER_DECODE[4])}[model.set]
    for case in () if args.start or args.no_profile else profiled:
        for before in (0, 4) if case.phase == "prefill" else (0,):
            try:
                name = case.key + (f" after {before}" if before else "")
                kernels, span = profile(engine, replay, contents, case, before)
                record.setdefault("profile", {})[name] = kernels
                record.setdefault("spans", {})[name] = span
            except Exception as error:
                print("ERROR profile", repr(error)[:300], flush=True)
                break
    args.out.write_text(json.dumps(record))
    print("END", model.key, round(time.time() - engine.began, 1), "s", flush=True)


if __name__ == "__main__":
    main()

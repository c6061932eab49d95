"""A whole model inside vLLM on two GPUs, placements interleaved, on the GPU machine.

    python two_gpus.py FOLDER MODEL dp|tp OUT [--redundant] [--balancer] [--budget SECONDS]
        [--turn FILE] [--smoke]

FOLDER: what two_prepare.py wrote. dp: two processes, each an engine of its own with attention for
its own requests, experts over both GPUs; they keep in step by taking the same cases in the same
order. tp: one engine, one process for each GPU. Placements change in place between steps, so the
same captured graphs serve all. Every rank writes OUT.RANK.json after each case.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np
from two_cases import (
    CASES,
    DECODE,
    MAX_BATCH_TOKENS,
    MAX_MODEL_LEN,
    MAX_SEQUENCES,
    MEMORY_FRACTION,
    PREFILL,
    PROFILED,
    REDUNDANT,
    ROUNDS,
    STEPS,
    WARM_STEPS,
    Case,
    names,
)

GRAPHS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
WAIT_S = 90.0
DRIFT_SEQUENCES = Case("decode", 128, 256)
SETTLE, BEFORE, AFTER = 20, 40, 30
WINDOW = 32
SYNCHRONOUS = (
    ("linear+", "intent"),
    ("", "summary"),
    ("", "intent"),
    ("", "summary"),
    ("bad+", "intent"),
    ("bad+", "summary"),
    ("eplb+", "intent"),
    ("time+", "summary"),
)
"""(maps to start from, or those that are there; domain) of every rearrangement."""
ASYNCHRONOUS = (("linear+", "intent"), ("", "summary"), ("bad+", "intent"))
WAYS = {
    "async": (ASYNCHRONOUS, ""),
    "sync-nccl": (SYNCHRONOUS, "torch_nccl"),
    "sync": (SYNCHRONOUS[:3], ""),
}
MOST_STEPS = 3000


class Engine:
    """The LLM of one rank (dp) or of both (tp), and the clock of its steps."""

    def __init__(self, args: argparse.Namespace, barrier: Any, late: Any) -> None:
        from vllm import LLM, SamplingParams
        from vllm.engine.arg_utils import EngineArgs

        self.sampling, self.barrier, self.late = SamplingParams, barrier, late
        kwargs: dict[str, Any] = {
            "model": str(args.folder / args.model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "max_model_len": MAX_MODEL_LEN,
            "max_num_batched_tokens": MAX_BATCH_TOKENS,
            "max_num_seqs": MAX_SEQUENCES,
            "gpu_memory_utilization": MEMORY_FRACTION,
            "enable_prefix_caching": False,
            "enable_expert_parallel": True,
            "disable_custom_all_reduce": True,
            "seed": 0,
            "kernel_config": {"moe_backend": "triton", "enable_flashinfer_autotune": False},
            "compilation_config": {
                "mode": 0,
                "cudagraph_capture_sizes": GRAPHS,
                "cudagraph_mode": "FULL_DECODE_ONLY",
            },
            "worker_extension_cls": "two_worker.Extension",
        }
        kwargs["distributed_executor_backend"] = "mp" if args.mode == "tp" else "uni"
        kwargs["tensor_parallel_size"] = 2 if args.mode == "tp" else 1
        if args.redundant:
            kwargs["enable_eplb"] = True
            kwargs["eplb_config"] = {
                "num_redundant_experts": REDUNDANT[args.model],
                "step_interval": 2_000_000_000,
                "window_size": WINDOW,
                "use_async": args.balancer,
            }
        EngineArgs(**kwargs).create_engine_config()  # fills vLLM's cache of model classes
        while args.turn and not args.turn.exists():
            time.sleep(0.1)
        self.began = time.time()
        self.llm = LLM(**kwargs)
        self.up_s = time.time() - self.began
        self.engine = self.llm.llm_engine
        config = self.engine.vllm_config
        self.vocab = config.model_config.get_vocab_size()
        self.number, self.passes = 0, 0
        self.rng = np.random.default_rng(1)
        executor = self.engine.model_executor
        execute = executor.execute_model

        def counted(scheduler_output: Any, *a: Any, **k: Any) -> Any:
            self.passes += scheduler_output.total_num_scheduled_tokens > 0
            return execute(scheduler_output, *a, **k)

        executor.execute_model = counted
        self.about = {
            "up_s": self.up_s,
            "async_scheduling": str(config.scheduler_config.async_scheduling),
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "all2all": str(config.parallel_config.all2all_backend),
            "blocks": config.cache_config.num_gpu_blocks,
        }

    def call(self, name: str, *args: Any) -> Any:
        """What this rank's (dp) or every rank's (tp) worker answers."""
        return self.llm.collective_rpc(name, args=args)

    def together(self, late: bool = False) -> bool:
        """Wait for the other rank; whether any rank is late."""
        if self.barrier is None:
            return late
        if late:
            self.late.value = 1
        self.barrier.wait(WAIT_S)
        return bool(self.late.value)

    def add(self, case: Case, new_tokens: int) -> list[str]:
        """Queue a case's requests."""
        found = []
        for _ in range(case.requests):
            self.number += 1
            tokens = self.rng.integers(10, self.vocab - 10, case.prompt).tolist()
            params = self.sampling(
                temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
            )
            self.engine.add_request(str(self.number), {"prompt_token_ids": tokens}, params)
            found.append(str(self.number))
        return found

    def drain(self) -> None:
        """Step until this rank has nothing left; ranks with the same requests take as many
        passes."""
        while self.engine.output_processor.has_unfinished_requests():
            self.engine.step()

    def run(self, passes: int) -> list[float]:
        """So many passes exactly; the time of the start and of every answer."""
        target, marks = self.passes + passes, [time.perf_counter()]
        while self.passes < target:
            if self.engine.step():
                marks.append(time.perf_counter())
        return marks

    def start_decode(self, case: Case) -> list[str]:
        """Requests queued and prefilled; a few decode steps taken."""
        found = self.add(case, MAX_MODEL_LEN - case.prompt - 1)
        self.run(-(-case.requests * case.prompt // MAX_BATCH_TOKENS) + 3)
        return found

    def stop(self, requests: list[str]) -> None:
        """Drop them."""
        self.together()
        self.engine.abort_request(requests)
        self.drain()


def prefill(engine: Engine, case: Case, plans: tuple[str, ...], rounds: int) -> list[Any]:
    """[round, placement, wall ms, passes of every worker]."""
    rows = []
    for number in range(-1, rounds):
        for name in plans:
            engine.call("two_use", name)
            engine.call("two_times")
            engine.add(case, 1)
            engine.together()
            began = time.perf_counter()
            engine.drain()
            wall = (time.perf_counter() - began) * 1e3
            times = engine.call("two_times")
            if number >= 0:
                rows.append([number, name, round(wall, 4), times])
    return rows


def decode(engine: Engine, case: Case, plans: tuple[str, ...], rounds: int) -> list[Any]:
    """[round, placement, wall ms of each step, passes of every worker]."""
    requests = engine.start_decode(case)
    rows = []
    for number in range(rounds):
        for name in plans:
            engine.call("two_use", name)
            engine.call("two_times")
            engine.together()
            marks = engine.run(STEPS)
            times = engine.call("two_times")
            walls = (np.diff(marks) * 1e3)[WARM_STEPS:]
            rows.append([number, name, [round(float(w), 4) for w in walls], times])
    engine.stop(requests)
    return rows


def checked(engine: Engine, plans: tuple[str, ...]) -> dict[str, Any]:
    """INV-1 of every placement and worker: a run of prefills and decodes with counting on."""
    found = {}
    for name in plans:
        engine.call("two_use", name, True)
        engine.together()
        engine.add(Case("prefill", 5, 300), 20)
        engine.add(Case("prefill", 2, 3000), 7)
        engine.drain()
        engine.together()
        found[name] = engine.call("moesim_check")
    return found


def profiled(engine: Engine, case: Case, name: str) -> Any:
    """The longest kernels of one prefill step or three decode steps, of every worker."""
    engine.call("two_use", name)
    requests = engine.start_decode(case) if case.phase == "decode" else engine.add(case, 1)
    engine.together()
    engine.call("two_profile", True)
    if case.phase == "decode":
        engine.run(3)
    else:
        engine.drain()
    found = engine.call("two_profile", False)
    engine.stop(requests)
    return found


def rearranged(
    engine: Engine, cycles: tuple[tuple[str, str], ...], synchronous: bool, backend: str
) -> Any:
    """Drifts and rearrangements while sequences decode."""
    way = engine.call("two_way", synchronous, backend)
    rows = []
    for maps, domain in cycles:
        requests = engine.start_decode(DRIFT_SEQUENCES)
        if maps:
            engine.call("two_use", maps)
        engine.call("two_domain", domain)
        before = engine.call("two_maps")[0]
        engine.together()
        first = engine.run(SETTLE)
        engine.call("two_log")
        engine.call("two_after", BEFORE)
        marks = engine.run(BEFORE + AFTER)
        while not synchronous and engine.call("two_busy")[0] and len(marks) < MOST_STEPS:
            marks += engine.run(20)[1:]
        engine.call("two_after", 0)
        last = engine.run(SETTLE)
        log = engine.call("two_log")
        after = engine.call("two_maps")[0]
        rows.append(
            {
                "maps": maps,
                "domain": domain,
                "before": before.tolist(),
                "after": after.tolist(),
                "marks": [[round(float(t), 6) for t in m] for m in (first, marks, last)],
                "log": log,
            }
        )
        engine.stop(requests)
    return {"way": way, "cycles": rows}


def rank(args: argparse.Namespace, number: int, barrier: Any, late: Any, port: int) -> None:
    """One process of the study."""
    os.environ.update(
        MOESIM_REPLAY=f"/tmp/{args.model}.{args.redundant}.replay.npz",
        VLLM_MOE_ROUTING_SIMULATION_STRATEGY="moesim_replay",
        VLLM_PLUGINS="moesim_replay",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
    )
    if args.mode == "dp":
        os.environ.update(
            VLLM_DP_RANK=str(number),
            VLLM_DP_RANK_LOCAL=str(number),
            VLLM_DP_SIZE="2",
            VLLM_DP_MASTER_IP="127.0.0.1",
            VLLM_DP_MASTER_PORT=str(port),
        )
    import vllm.entrypoints.llm
    import vllm.v1.worker.gpu_worker

    engine = Engine(args, barrier, late)
    out = Path(f"{args.out}.{number}.json")
    plans = names(args.redundant)
    record: dict[str, Any] = {
        "model": args.model,
        "mode": args.mode,
        "redundant": args.redundant,
        "rank": number,
        "vllm": vllm.__version__,
        **engine.about,
        "cases": {},
    }
    print("UP", json.dumps(record), flush=True)
    engine.call("two_load", str(args.folder), args.model, args.redundant)
    record["memory"] = engine.call("two_memory")

    def note(what: str, where: dict[str, Any], key: str, made: Any) -> None:
        began = time.time()
        try:
            where[key] = made()
        except Exception as error:
            where[key] = {"error": repr(error)[:500]}
            print("ERROR", what, key, repr(error)[:500], flush=True)
        out.write_text(json.dumps(record))
        print("DONE", what, key, round(time.time() - began, 1), "s", flush=True)

    note("check", record, "check", lambda: checked(engine, plans))
    print("CHECK", json.dumps(record["check"])[:300], flush=True)
    began, rounds = time.time(), 2 if args.smoke else ROUNDS
    columns = ["round", "placement", "wall_ms", "[gpu_ms, host_ms] of each pass, by worker"]
    record["columns"] = columns
    for case in (DECODE[1], PREFILL[1]) if args.smoke else CASES:
        if engine.together(time.time() - began > args.budget):
            record.setdefault("left_out", []).append(case.key)
            continue
        measure = prefill if case.phase == "prefill" else decode
        note(
            "case", record["cases"], case.key, lambda m=measure, c=case: m(engine, c, plans, rounds)
        )
    if args.balancer:
        balancer: dict[str, Any] = {}
        record["balancer"] = balancer
        note(
            "balancer",
            balancer,
            "about",
            lambda: engine.call("two_balancer", str(args.folder), args.model),
        )
        for way, (cycles, backend) in WAYS.items():
            cycles = cycles[:2] if args.smoke else cycles
            inside = way.startswith("sync")
            note(
                "balancer",
                balancer,
                way,
                lambda i=inside, c=cycles, b=backend: rearranged(engine, c, i, b),
            )
    for name in (plans[0], plans[-1]):
        for case in PROFILED[:1] if args.smoke else PROFILED:
            found = record.setdefault("profile", {})
            note(
                "profile",
                found,
                f"{name} {case.key}",
                lambda n=name, c=case: profiled(engine, c, n),
            )
    out.write_text(json.dumps(record))
    print("END", args.model, args.mode, round(time.time() - engine.began, 1), "s", flush=True)
    os._exit(0)


def main() -> None:
    """One process, or two that go in step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("mode", choices=("dp", "tp"))
    parser.add_argument("out")
    parser.add_argument("--redundant", action="store_true")
    parser.add_argument("--balancer", action="store_true")
    parser.add_argument("--budget", type=float, default=1e9)
    parser.add_argument("--turn", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    write_first(args)
    if args.mode == "tp":
        rank(args, 0, None, None, 0)
        return
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    barrier, late = context.Barrier(2), context.Value("i", 0)
    both = [context.Process(target=rank, args=(args, n, barrier, late, port)) for n in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    os._exit(max(abs(p.exitcode or 0) for p in both))


def write_first(args: argparse.Namespace) -> None:
    """The replay file that the engine starts with: linear."""
    from two_worker import placed

    from moesim.engine.content import load_content, save_content

    base = load_content(args.folder / f"{args.model}.replay.npz")
    plans = np.load(args.folder / f"{args.model}.plans.npz")
    name = names(args.redundant)[0]
    path = f"/tmp/{args.model}.{args.redundant}.replay.npz"
    save_content(placed(base, plans[name], args.redundant), path)


if __name__ == "__main__":
    main()

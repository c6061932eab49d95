"""`torchrun ... -m moesim.replay calibrate | validate | offload`: argparse, no other packages."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable

from moesim.replay.process import DEFAULT_TIMEOUT_S, joined, run_rank


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="moesim.replay",
        description="Replay routing traces through plans on this machine's GPUs.",
        epilog="Example: torchrun --nproc-per-node 2 -m moesim.replay validate --plan linear.json"
        " --plan eplb.json --trace t.npz --shape olmoe.json --out measured.json",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    calibrate = commands.add_parser("calibrate", help="measure links, experts, copies, launches")
    add_calibrate_arguments(calibrate)
    _add_common(calibrate, time_limit_s=240.0)
    validate = commands.add_parser("validate", help="time plans on real collectives and GEMMs")
    add_validate_arguments(validate)
    _add_common(validate)
    offload = commands.add_parser("offload", help="time expert caches on one GPU")
    add_offload_arguments(offload)
    _add_common(offload, time_limit_s=300.0)
    return parser


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `calibrate`."""
    parser.add_argument("--shape", action="append", default=[], help="JSON text or file; repeat")
    parser.add_argument("--max-tokens", type=int, default=8192, help="largest batch per rank")
    parser.add_argument("--max-bytes", type=int, default=512 << 20, help="largest message or copy")
    parser.add_argument("--section", action="append", default=[], help="only these; repeat")
    parser.add_argument("--ffn", choices=("auto", "grouped_mm", "loop"), default="auto")
    parser.add_argument("--ffn-rows", type=float, nargs="+", default=[], help="mean rows a slot")
    parser.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
    parser.add_argument("--budget", type=float, default=0.06, help="seconds of timing a case")


def add_validate_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `validate`."""
    parser.add_argument("--plan", action="append", required=True, help="plan JSON; repeat for more")
    parser.add_argument("--trace", required=True, help="token-level trace")
    parser.add_argument("--shape", required=True, help="model shape, JSON text or file")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[128, 1024, 8192], help="tokens per rank"
    )
    parser.add_argument("--batches", type=int, default=2, help="batches of each size")
    parser.add_argument("--layers", type=int, default=8, help="layers of the trace (0: all)")
    parser.add_argument("--mode", choices=("both", "graph", "eager"), default="both")
    parser.add_argument("--dedup", choices=("gpu", "none"), default="gpu")
    parser.add_argument("--replica-policy", choices=("split", "hash", "nearest"))
    parser.add_argument("--phase", choices=("auto", "decode", "prefill"), default="auto")
    parser.add_argument("--ffn", choices=("auto", "grouped_mm", "loop"), default="auto")
    parser.add_argument("--weight-sets", type=int, default=0, help="0: enough to exceed the L2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=0.3, help="seconds of timing a unit")
    parser.add_argument("--max-reps", type=int, default=20)
    parser.add_argument("--memory-limit-gb", type=float, help="pretend each rank has no more")
    parser.add_argument("--all-requests", action="store_true", help="not the held-out half alone")
    parser.add_argument("--no-checks", action="store_true", help="skip numerics and conservation")


def add_offload_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `offload`."""
    parser.add_argument("--shape", required=True, help="model shape, JSON text or file")
    parser.add_argument("--trace", help="token-level trace, for the built-in LRU schedules")
    parser.add_argument("--schedule", action="append", default=[], help="schedule .npz; repeat")
    parser.add_argument(
        "--cache-share", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="of the experts"
    )
    parser.add_argument("--lookahead", type=int, nargs="+", default=[0, 1], help="steps; 0: none")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--warm-tokens", type=int, default=16)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--other-us", type=float, default=0.0, help="busy wait after each step")
    parser.add_argument("--seed", type=int, default=0)


def _add_common(parser: argparse.ArgumentParser, time_limit_s: float = 3600.0) -> None:
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--timeout", type=float, default=DEFAULT_TIMEOUT_S, help="seconds without progress"
    )
    parser.add_argument(
        "--time-limit", type=float, default=time_limit_s, help="stop in good order after (s)"
    )


def _calibrate(arguments: argparse.Namespace) -> int:
    from moesim.replay.calibrate import DEFAULT_SHAPES, CalibrateOptions, calibrate
    from moesim.replay.shape import load_shape

    options = CalibrateOptions(
        shapes=tuple(load_shape(text) for text in arguments.shape) or DEFAULT_SHAPES,
        max_tokens_per_rank=arguments.max_tokens,
        max_bytes=arguments.max_bytes,
        budget_s=arguments.budget,
        time_limit_s=arguments.time_limit,
        sections=tuple(arguments.section),
        ffn=arguments.ffn,
        graphs=not arguments.no_graphs,
        ffn_rows=tuple(arguments.ffn_rows),
    )
    with joined(arguments.device, arguments.timeout) as ctx:
        record = calibrate(ctx, options, arguments.out)
        if ctx.rank == 0 and arguments.out is None:
            print(json.dumps(record, separators=(",", ":")))
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    from moesim.replay.shape import load_shape
    from moesim.replay.validate import ValidateOptions, validate

    limit = arguments.memory_limit_gb
    options = ValidateOptions(
        tokens_per_rank=tuple(arguments.tokens),
        num_batches=arguments.batches,
        num_layers=arguments.layers,
        modes=("graph", "eager") if arguments.mode == "both" else (arguments.mode,),
        dedup=arguments.dedup,
        policy=arguments.replica_policy,
        phase=arguments.phase,
        ffn=arguments.ffn,
        weight_sets=arguments.weight_sets,
        seed=arguments.seed,
        budget_s=arguments.budget,
        max_reps=arguments.max_reps,
        memory_limit_bytes=None if limit is None else int(limit * 1e9),
        time_limit_s=arguments.time_limit,
        held_out=not arguments.all_requests,
        checks=not arguments.no_checks,
    )
    shape = load_shape(arguments.shape)
    with joined(arguments.device, arguments.timeout) as ctx:
        record = validate(ctx, arguments.plan, arguments.trace, shape, options, arguments.out)
        if ctx.rank == 0 and arguments.out is None:
            print(json.dumps(record, separators=(",", ":")))
    return 0


def _offload(arguments: argparse.Namespace) -> int:
    from moesim.replay.offload import OffloadOptions, offload
    from moesim.replay.schedule import load_schedule
    from moesim.replay.shape import load_shape

    options = OffloadOptions(
        cache_shares=tuple(arguments.cache_share),
        lookaheads=tuple(arguments.lookahead),
        num_tokens=arguments.tokens,
        warm_tokens=arguments.warm_tokens,
        num_layers=arguments.layers,
        other_us=arguments.other_us,
        seed=arguments.seed,
        time_limit_s=arguments.time_limit,
    )
    shape = load_shape(arguments.shape)
    schedules = [load_schedule(path) for path in arguments.schedule]
    with joined(arguments.device, arguments.timeout) as ctx:
        record = offload(ctx, shape, arguments.trace, schedules, options, arguments.out)
        if ctx.rank == 0 and arguments.out is None:
            print(json.dumps(record, separators=(",", ":")))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "calibrate": _calibrate,
    "validate": _validate,
    "offload": _offload,
}


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and return the exit code: 0 done, 1 wrong result, 2 bad input, 3 lost a peer."""
    arguments = build_parser().parse_args(argv)
    if "OMP_NUM_THREADS" not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    return run_rank(lambda: COMMANDS[arguments.command](arguments))


if __name__ == "__main__":
    sys.exit(main())

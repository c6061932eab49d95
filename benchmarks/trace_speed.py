"""Speed of the statistics pass and of the synthetic generator, and the memory of the former.

Writes a synthetic directory trace (50 layers of 64 experts, top-8), then counts it in a process of
its own, whose largest resident set is printed. Usage:

    python benchmarks/trace_speed.py [--tokens 2000000] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moesim.trace.format import load_token_trace
from moesim.trace.stats import trace_stats
from moesim.trace.synth import generate, write_synthetic
from moesim.trace.synth_shape import design

NUM_LAYERS = 50


def count(path: str) -> None:
    """Load and count the trace at `path`, and print figures of this process."""
    start = time.perf_counter()
    trace = load_token_trace(path, "the benchmark")
    loaded = time.perf_counter()
    trace_stats(trace)
    done = time.perf_counter()
    work = trace.num_tokens * trace.num_layers
    print(f"{work / 1e6:.1f} million token-layers on disk")
    print(f"load and validate  {work / (loaded - start) / 1e6:6.2f} million token-layers/s")
    print(f"statistics pass    {work / (done - loaded) / 1e6:6.2f} million token-layers/s")
    print(
        f"largest resident set {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--count", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        count(options.count)
        return
    spec = design(range(NUM_LAYERS), 64, 8, num_domains=3)
    generate(spec, 1000, 0)
    start = time.perf_counter()
    num_tokens = 40_000
    generate(spec, num_tokens, 1)
    rate = num_tokens * NUM_LAYERS / (time.perf_counter() - start)
    print(f"generator          {rate / 1e6:6.2f} million token-layers/s, 64 experts, top-8")
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="moesim-trace-"))
    try:
        write_synthetic(spec, folder / "trace", options.tokens, seed=1)
        subprocess.run(
            [sys.executable, __file__, "--count", str(folder / "trace")],
            check=True,
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

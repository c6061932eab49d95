"""Accesses per second of the cache simulation, beside other simulators in the same run.

Runs every policy over all layers of the bundled trace. One pass gives the hits of every cache
size; the peers give one size at a time: an `OrderedDict` in plain Python, and libCacheSim where it
is installed (`pip install libcachesim`), whose LRU misses must be the same. Usage:

    python benchmarks/cache_throughput.py [--repeat 5] [--trace sample:debian-moe]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np

from moesim.caching.events import decode_stream
from moesim.caching.policies import POLICIES
from moesim.caching.simulate import CacheSettings, expert_frequency, layer_choices, run_policy
from moesim.trace.batches import index_requests
from moesim.trace.format import load_token_trace

RECORD = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])


def ordered_dict_misses(items: list[int], capacity: int) -> int:
    held: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for item in items:
        if item in held:
            held.move_to_end(item)
            continue
        misses += 1
        if len(held) == capacity:
            held.popitem(last=False)
        held[item] = None
    return misses


def libcachesim_misses(path: Path, name: str, capacity: int) -> tuple[int, float]:
    """(misses, seconds) of libCacheSim on an oracleGeneral file."""
    import libcachesim

    reader = libcachesim.TraceReader(
        trace=str(path), trace_type=libcachesim.TraceType.ORACLE_GENERAL_TRACE
    )
    cache = getattr(libcachesim, name)(cache_size=capacity)
    start = time.perf_counter()
    ratio, _ = cache.process_trace(reader)
    return round(ratio * reader.get_num_of_req()), time.perf_counter() - start


def write_oracle(items: np.ndarray, path: Path) -> None:
    record = np.zeros(len(items), RECORD)
    record["time"], record["id"], record["size"] = np.arange(len(items)), items + 1, 1
    upcoming = np.full(int(items.max()) + 1, -1, np.int64)
    for i in range(len(items) - 1, -1, -1):
        record["next"][i] = upcoming[items[i]]
        upcoming[items[i]] = i
    record.tofile(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", default="sample:debian-moe")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    trace = load_token_trace(options.trace, "the cache benchmark")
    requests, _ = index_requests(trace)
    stream = decode_stream(requests)
    frequency = expert_frequency(trace, requests)
    layers = [layer_choices(trace, stream, layer, frequency) for layer in range(trace.num_layers)]
    accesses = sum(int((c.ids >= 0).sum()) for c in layers)
    print(
        f"{options.trace}: {accesses / 1e6:.1f} M accesses, {trace.num_layers} layers of"
        f" {trace.num_experts} experts; median of {options.repeat}"
    )
    print(f"{'':28}{'accesses/s':>12}{'cache sizes':>13}{'x sizes/s':>12}")
    for semantics in ("atomic", "sequential"):
        for name in POLICIES:
            settings = CacheSettings(name, semantics)
            run_policy(layers[0], settings)
            times = []
            for _ in range(options.repeat):
                start = time.perf_counter()
                for choices in layers:
                    run_policy(choices, settings)
                times.append(time.perf_counter() - start)
            rate = accesses / statistics.median(times)
            total = rate * trace.num_experts
            print(f"{name + ', ' + semantics:<28}{rate:12.3g}{trace.num_experts:13}{total:12.3g}")
    peers(layers[trace.num_layers // 2], trace.num_experts // 4)


def peers(choices, capacity: int) -> None:  # type: ignore[no-untyped-def]
    """One layer, one cache size, sequential accesses."""
    items = choices.ids[choices.ids >= 0]
    ours = run_policy(choices, CacheSettings("lru", "sequential"))
    expected = int(len(items) - ours.hits()[capacity])
    listed = items.tolist()
    start = time.perf_counter()
    found = ordered_dict_misses(listed, capacity)
    rate = len(items) / (time.perf_counter() - start)
    if found != expected:
        raise SystemExit(f"OrderedDict LRU has {found} misses, ours {expected}")
    print(f"{'OrderedDict lru (same misses)':<28}{rate:11.3g}{1:13}{rate:12.3g}")
    try:
        import libcachesim  # noqa: F401
    except ImportError:
        print("libCacheSim is not installed: left out")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.oracleGeneral"
        write_oracle(items, path)
        for name in ("LRU", "LFU", "Belady"):
            misses, seconds = libcachesim_misses(path, name, capacity)
            rate = len(items) / seconds
            own = run_policy(choices, CacheSettings(name.lower(), "sequential"))
            mine = int(len(items) - own.hits()[capacity])
            label = f"libCacheSim {name}"
            print(f"{label:<28}{rate:12.3g}{1:13}{rate:12.3g}   misses {misses}, ours {mine}")
            if name == "LRU" and misses != mine:
                raise SystemExit("libCacheSim's LRU has other misses than ours")


if __name__ == "__main__":
    main()

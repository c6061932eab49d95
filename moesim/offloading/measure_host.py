"""This computer as a host: its memory, its cores, and matrix products of experts' sizes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError

Matrix = npt.NDArray[np.float32]

EXPERT_SHAPE = (4096, 1536)
"""Hidden size and width of the experts measured, Qwen3-235B-A22B's."""
TINY_SHAPE = (64, 16)
"""Of experts whose time is the calls' alone."""
MANY_TOKENS = 256
READ_BYTES = 1 << 30
REPEATS = 5
SOURCE = "measured by moesim calibrate with numpy, float32"


def measure_host(name: str, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """A host file's content, measured here, without the link. Raises InputError off Linux.

    Memory: all cores read an array of READ_BYTES. Kernels: the three products of a tiny expert give
    the calls' cost, those of a large one with one token the rate beyond it, with MANY_TOKENS tokens
    the TFLOPS. The best of several runs: what else runs here slows it. Nothing is pinned to cores.
    """
    info = _cpu_info()
    cores = len(os.sched_getaffinity(0))
    say(f"memory, {cores} cores")
    read = _read_gb_per_s(cores)
    say("matrix products")
    call_us, rate, tflops = _kernels()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    model = info.get("model name", "this computer")
    measured = {"kind": "measured", "source": SOURCE}
    return {
        "format": "moesim-host",
        "version": 1,
        "name": name,
        "title": f"{model}, {cores} cores",
        "memory": {"dram_gb": _short(memory / 2**30), "dram_gb_per_s": _short(read), **measured},
        "cpu": {
            "sockets": _sockets(),
            "cores": cores,
            "ghz": _short(float(info.get("cpu MHz", "3000")) / 1000),
            "vectors": vectors_of(info.get("flags", info.get("Features", "")).split()),
            "kind": "measured",
            "source": "/proc/cpuinfo",
        },
        "kernels": {
            "call_us": _short(call_us),
            "read_gb_per_s": _short(rate),
            "tflops": _short(tflops),
            **measured,
        },
    }


def _short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def vectors_of(flags: list[str]) -> str:
    """The widest vectors among a CPU's flags. Raises InputError where there is none that counts."""
    known = set(flags)
    for name, needed in (
        ("amx", "amx_tile"),
        ("avx512", "avx512f"),
        ("avx_vnni", "avx_vnni"),
        ("avx2", "avx2"),
    ):
        if needed in known:
            return name
    if known & {"asimd", "neon"}:
        return "neon"
    raise InputError("this CPU has neither AVX2 nor NEON", "write the host's file by hand")


def _cpu_info() -> dict[str, str]:
    """Keys of the first CPU, the highest clock of all. Raises InputError off Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        raise InputError("only Linux is measured", "write the host's file by hand") from None
    pairs = [line.partition(":") for line in text.splitlines() if ":" in line]
    found: dict[str, str] = {}
    for key, _, value in pairs:
        found.setdefault(key.strip(), value.strip())
    clocks = [float(value) for key, _, value in pairs if key.strip() == "cpu MHz"]
    return found | ({"cpu MHz": str(max(clocks))} if clocks else {})


def _sockets() -> int:
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/physical_package_id")
    return len({path.read_text(encoding="utf-8").strip() for path in files}) or 1


def _read_gb_per_s(cores: int) -> float:
    size = min(READ_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8)
    data = np.ones(size // 4, np.float32)
    parts = np.array_split(data, cores)
    with ThreadPoolExecutor(cores) as pool:
        times = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            list(pool.map(np.dot, parts, parts))
            times.append(time.perf_counter() - begin)
    return data.nbytes / min(times) / 1e9


def _kernels() -> tuple[float, float, float]:
    """Microseconds of a call, GB/s of one token's weights, TFLOPS of many tokens."""
    _, call = _expert_s(TINY_SHAPE, 1)
    num_bytes, one = _expert_s(EXPERT_SHAPE, 1)
    _, many = _expert_s(EXPERT_SHAPE, MANY_TOKENS)
    rate = num_bytes / max(one - call, one / 2)
    return call * 1e6, rate / 1e9, 2 * MANY_TOKENS * num_bytes / 4 / many / 1e12


def _expert_s(shape: tuple[int, int], tokens: int) -> tuple[int, float]:
    """Bytes of an expert, and the least seconds of its products; experts take turns, so that none
    is left in a cache."""
    hidden, width = shape
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> Matrix:
        return rng.standard_normal((rows, columns), np.float32)

    def expert() -> tuple[Matrix, Matrix, Matrix]:
        return matrix(width, hidden), matrix(width, hidden), matrix(hidden, width)

    count = min(8, max(2, (512 << 20) // (12 * hidden * width)))
    experts = [expert() for _ in range(count if tokens == 1 else 2)]
    x, times = matrix(hidden, tokens), []
    for gate, up, down in experts * REPEATS:
        begin = time.perf_counter()
        down @ (np.maximum(gate @ x, 0) * (up @ x))
        times.append(time.perf_counter() - begin)
    return 12 * hidden * width, min(times)

"""Rates of GPUs, CPUs and host links on one conversation, as engines with quantised kernels reach.

Shares of datasheet figures and fixed costs, by maker. They were set once, by hand, on runs that
`reports/offloading-people` shows as fitted and does not count: gpt-oss-20b wholly on one GPU (RTX
3090, RTX 4080 Super, RTX 4090, DGX Spark, M2 Ultra), Qwen3-30B-A3B, gpt-oss-20b and
DeepSeek-V2-Lite on an RTX 2080 beside an i9-10900X, Qwen3-30B-A3B on an i7-8700 alone and on an RTX
4080 beside a Ryzen 7950X, Qwen3-235B-A22B on an RTX A6000 beside a Threadripper PRO 7965WX and on
an RTX 3090 beside an EPYC 9355, gpt-oss-120b on an RTX 3090 and on Strix Halo (for all of AMD's
GPUs), prompts of DeepSeek-V2-Lite on an RTX 3090 (ggml-org/llama.cpp#15525), and KTransformers'
tables of DeepSeek-R1 on Xeon 6454S and of Qwen3-Coder-Next on an RTX 5090. All of it counts as
assumed.

Ignored: clocks that fall under load, memory that other programs use, threads badly placed.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesim.cluster import GpuSpec, Host, Machine

READ_SHARE = {"NVIDIA": 0.75, "AMD": 0.75, "Apple": 0.6}
"""Of the memory's bandwidth, reached on the weights of one token."""
LAYER_US = {"NVIDIA": 45.0, "AMD": 60.0, "Apple": 30.0}
"""Launches of one layer of a token, beyond reading its weights."""
CHOICE_US = {"Apple": 22.0}
"""More for each expert that a token chooses in a layer: narrow matrices leave Metal's kernels short
of work. Set on an M3 Ultra's Qwen3-30B-A3B with gpt-oss-20b on an M2 Ultra in view."""
NO_GRAPH_US = 90.0
"""More for launches of one layer on NVIDIA where llama.cpp runs without CUDA graphs, as it does
once any tensor is on the CPU (ggml-org/llama.cpp#18593): median of the six models that
ggml-org/llama.cpp#27721 times with and without them, 34 to 268."""
PROMPT_SHARE = {"NVIDIA": 0.5, "AMD": 0.25, "Apple": 0.6}
UNIFIED_PROMPT_SHARE = {"NVIDIA": 0.18, "AMD": 0.15, "Apple": 0.6}
"""Of the dense 16-bit rate, reached on prompts by engines of 16-bit and 8-bit weights: cards, and
GPUs that share the host's memory."""
QUANT_SHARE = {"NVIDIA": 0.36, "AMD": 0.25, "Apple": 0.6}
UNIFIED_QUANT_SHARE = {"NVIDIA": 0.21, "AMD": 0.33, "Apple": 0.6}
"""The same of llama.cpp's kernels, which multiply quantised weights as they are."""
LINK_SHARE = 0.75
"""Of the host link, for copies of whole tensors."""
DRAM_SHARE = {"datasheet": 0.65, "assumed": 0.65, "measured": 0.9}
"""Of DRAM bandwidth, by what its figure is: channels x transfers, or measured."""
WEIGHTS_PER_CYCLE = {"avx2": 1.7, "avx_vnni": 2.3, "avx512": 2.3, "amx": 2.3, "neon": 1.7}
"""Weights of few bits that one core unpacks and multiplies with one token per cycle; what has
dot-product instructions is assumed equal."""
FLOPS_PER_CYCLE = {"avx2": 12.0, "avx_vnni": 12.0, "avx512": 25.0, "amx": 100.0, "neon": 12.0}
"""Of one core on many tokens at once."""
CPU_CALL_US = 120.0
"""Of one layer on the CPU: hidden states there and back, threads woken, graphs split."""
ALL_REDUCES_S = 30e-6
"""Two all-reduces of one token's layer over PCIe, with tensor parallelism."""
UNIFIED_SHARE = {"Apple": 0.75}
"""Of unified memory that a GPU may take; 0.9 for others."""
HOST_SHARE = 0.95
"""Of a host's memory that weights may fill."""
MARGIN_BYTES = 1 << 30
"""Left free on every GPU, as --fit-target of llama.cpp does by default: CUDA context, desktop."""


SEEN = (
    "rtx-3090", "rtx-4090", "rtx-5090", "rtx-pro-6000", "rx-7900-xtx", "strix-halo", "dgx-spark",
    "m3-ultra",
)  # fmt: skip
"""GPUs of which reports/offloading-people has runs."""


@dataclass(frozen=True, slots=True)
class GpuRates:
    """bytes/s of weights on one token, flop/s on prompts (of quantised weights: quant_flops),
    bytes/s over the host link, seconds of one layer's launches and of each chosen expert's, and
    bytes that an engine may fill."""

    read: float
    flops: float
    quant_flops: float
    link: float
    layer_s: float
    choice_s: float
    memory: float


@dataclass(frozen=True, slots=True)
class CpuRates:
    """bytes/s and weights/s on one token, flop/s on many, seconds of one layer's call."""

    read: float
    weights: float
    flops: float
    call_s: float = CPU_CALL_US * 1e-6

    def token_s(self, num_bytes: float, num_weights: float) -> float:
        """Seconds for one token to go through weights of that size."""
        return max(num_bytes / self.read, num_weights / self.weights)


def maker(gpu: GpuSpec) -> str:
    """NVIDIA, AMD or Apple, the first where the title names none of them."""
    word = gpu.title.split()[0]
    return word if word in READ_SHARE else "NVIDIA"


def gpu_rates(gpu: GpuSpec, unified: bool, memory_gb: float | None = None) -> GpuRates:
    """Rates of a GPU. A card's GB are GiB, those of unified memory are not; `memory_gb`: GB that
    may be used instead."""
    name = maker(gpu)
    if memory_gb is not None:
        memory = memory_gb * 1e9
    elif unified:
        memory = gpu.hbm_gb * 1e9 * UNIFIED_SHARE.get(name, 0.9)
    else:
        memory = gpu.hbm_gb * 2**30
    shares = UNIFIED_PROMPT_SHARE if unified else PROMPT_SHARE
    quant = UNIFIED_QUANT_SHARE if unified else QUANT_SHARE
    peak = gpu.peak_tflops("bf16") * 1e12
    return GpuRates(
        read=gpu.hbm_gb_per_s * 1e9 * READ_SHARE[name],
        flops=peak * shares[name],
        quant_flops=peak * quant[name],
        link=gpu.pcie_gb_per_s * 1e9 * LINK_SHARE,
        layer_s=LAYER_US[name] * 1e-6,
        choice_s=CHOICE_US.get(name, 0.0) * 1e-6,
        memory=memory - MARGIN_BYTES,
    )


def doubts(machine: Machine) -> tuple[str, ...]:
    """What the rates of a machine's GPUs lack: a published run, or a datasheet's figures."""
    found = []
    for gpu in {gpu.name: gpu for gpu in machine.gpus}.values():
        kinds = {b.where.rpartition(": ")[2]: b.kind for b in gpu.blocks}
        names = {"memory": "memory bandwidth", "compute": "16-bit rate"}
        assumed = [text for key, text in names.items() if kinds.get(key) == "assumed"]
        if assumed:
            found.append(f"{gpu.name}'s {' and '.join(assumed)} assumed, not a datasheet's")
        if gpu.name not in SEEN:
            found.append(
                f"no published run of {gpu.name} stands behind the shares that its memory and"
                f" arithmetic are assumed to reach: those of {maker(gpu)}'s other GPUs"
            )
    return tuple(found)


def filled_gb(machine: Machine) -> tuple[float, ...]:
    """GB of each GPU's memory, all that an engine may fill and its margin."""
    unified = machine.host.unified
    return tuple((gpu_rates(g, unified).memory + MARGIN_BYTES) / 1e9 for g in machine.gpus)


def host_bytes(host: Host) -> float:
    """Bytes of weights that a host may hold; GB of memory modules are GiB."""
    return host.dram_gb * 2**30 * HOST_SHARE


def cpu_rates(host: Host, sockets_share: float) -> CpuRates:
    """Rates of a host; `sockets_share`: of what several sockets have together, that an engine
    reaches (1 of one socket). Measured kernels replace what is assumed of channels and cores, but
    for the rate of unpacking weights."""
    share = sockets_share if host.sockets > 1 else 1.0
    kind = next((b.kind for b in host.blocks if b.where.endswith(": memory")), "assumed")
    cycles = host.cores * host.ghz * 1e9 * share
    weights = cycles * WEIGHTS_PER_CYCLE[host.vectors]
    if host.kernels is not None:
        call_us, read, tflops = host.kernels
        return CpuRates(read * 1e9 * share, weights, tflops * 1e12 * share, call_us * 1e-6)
    read = host.dram_gb_per_s * 1e9 * DRAM_SHARE[kind] * share
    return CpuRates(read, weights, cycles * FLOPS_PER_CYCLE[host.vectors])

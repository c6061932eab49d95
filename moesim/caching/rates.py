"""How fast experts move and run: HBM, host link, host DRAM and CPU, NVMe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from moesim.caching.timeline_kernel import StepTimes
from moesim.cluster.machine import USUAL_HOST, Machine
from moesim.cluster.types import GpuSpec
from moesim.cost.calibration import Calibration
from moesim.cost.curves import Basis, weakest
from moesim.cost.datasheet import HBM_EFFICIENCY, TFLOPS_EFFICIENCY
from moesim.cost.expert_gemm import ExpertGemmModel
from moesim.cost.step import calibration_of_gpu
from moesim.errors import InputError
from moesim.model.names import WEIGHT_BYTES, ModelSpec, bytes_per
from moesim.offloading.rates import NO_GRAPH_US, cpu_rates, gpu_rates, maker
from moesim.types import FloatArray

SCALE_BITS = 0.5
"""Bits per weight for the scales of a quantised expert: 16 bits for each group of 32."""
SOCKETS_SHARE = 0.8
"""Of several sockets' rates that a NUMA-aware engine reaches; assumed."""
KERNELS_BEFORE_GATE = 6
"""Kernels of a layer before its experts: two norms, projections, attention, output, router."""


@dataclass(frozen=True, slots=True)
class HostSpec:
    """The host beside one GPU, or the share of it that one GPU may use.

    cpu_us, dram_gb_per_s: an expert of few tokens costs the first plus its bytes at the second;
    cpu_tflops: rate of an expert on many tokens. nvme_gb_per_s: sequential reads. `kind` and
    `source` say where the CPU's figures come from; those of NVMe are always assumed. A NVMe of 0
    GB is none. The defaults are those of torch's bf16 matrix products: an engine with CPU kernels
    of its own comes closer to the DRAM's rate (110 GB/s there, in float32).
    """

    name: str = "16 Xeon vCPUs with AMX"
    dram_gb: float = 256.0
    dram_gb_per_s: float = 54.5
    cpu_us: float = 210.0
    cpu_tflops: float = 2.46
    nvme_gb: float = 1000.0
    nvme_gb_per_s: float = 6.0
    nvme_us: float = 80.0
    kind: Basis = "measured"
    source: str = "16 Xeon vCPUs, torch 2.11, bf16: reports/offloading/host_rates_h200.json"

    def __post_init__(self) -> None:
        for name in ("dram_gb_per_s", "cpu_tflops", "nvme_gb_per_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"host {name} must be positive and finite", "give a rate above 0")
        for name in ("dram_gb", "nvme_gb", "nvme_us", "cpu_us"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"host {name} must be finite, not negative", "give 0 or more")


@dataclass(frozen=True, slots=True, eq=False)
class Rates:
    """What `StepTimes` are made from, for one model on one GPU and host.

    `basis` is the weakest kind among them and `notes` name each with its source. `num_gpus`: GPUs
    of the host that copy at once. read_share: of HBM's bandwidth, reached on dense weights.
    layer_us: launches of one layer in all, None for those of the GPU's figures. no_graph_us: more
    of them where experts are outside of GPU memory and CUDA graphs go (`offloaded`).
    """

    model: ModelSpec
    gpu: GpuSpec
    host: HostSpec
    experts: ExpertGemmModel
    calibration: Calibration
    basis: Basis
    notes: tuple[str, ...] = field(default=())
    num_gpus: int = 1
    read_share: float = HBM_EFFICIENCY
    layer_us: float | None = None
    no_graph_us: float = 0.0

    def offloaded(self) -> Rates:
        """These rates without CUDA graphs; what a call of the CPU takes has that in it already."""
        if self.layer_us is None or not self.no_graph_us:
            return self
        within = self.no_graph_us / self.model.real_top_k
        host = replace(self.host, cpu_us=max(0.0, self.host.cpu_us - within))
        return replace(self, host=host, layer_us=self.layer_us + self.no_graph_us, no_graph_us=0.0)

    def transfer_s(self, num_bytes: npt.ArrayLike) -> FloatArray:
        """Seconds of one copy of `num_bytes` from pinned host memory to the GPU."""
        return self.calibration.host_copy("h2d", self.num_gpus).time_us(num_bytes) * 1e-6

    def nvme_s(self, num_bytes: npt.ArrayLike) -> FloatArray:
        """Seconds of one copy from NVMe through host memory, the two transfers overlapped."""
        return np.maximum(self.read_s(num_bytes), self.transfer_s(num_bytes))

    def read_s(self, num_bytes: npt.ArrayLike) -> FloatArray:
        """Seconds of reading `num_bytes` from NVMe into host memory."""
        rate = self.host.nvme_gb_per_s * 1e9
        return self.host.nvme_us * 1e-6 + np.asarray(num_bytes, np.float64) / rate

    def cpu_s(self, tokens: npt.ArrayLike, num_bytes: float) -> FloatArray:
        """Seconds of one expert of `num_bytes` on the CPU, by its tokens: a fixed cost plus the
        larger of reading the weights and the arithmetic. Fiddler (arXiv:2402.07033, section 3.3)
        has the same two regimes, constant and linear in the tokens."""
        n = np.asarray(tokens, np.float64)
        read = num_bytes / (self.host.dram_gb_per_s * 1e9)
        work = n * self.model.expert_flops_per_token / (self.host.cpu_tflops * 1e12)
        return np.where(n > 0, self.host.cpu_us * 1e-6 + np.maximum(read, work), 0.0)


def build_rates(
    model: ModelSpec,
    gpu: GpuSpec,
    host: HostSpec,
    calibration: Calibration | None = None,
    num_gpus: int = 1,
) -> Rates:
    """Rates from the GPU's calibration, or datasheet figures where there is none. `num_gpus`: GPUs
    of the host that copy at once."""
    found = calibration or calibration_of_gpu(gpu, None, only_type=True)
    experts = _expert_model(found, model.expert_dtype)
    copy = found.host_copy("h2d", num_gpus)
    basis = weakest(experts.basis, copy.basis, host.kind, "assumed")
    notes = (
        f"experts on the GPU: {experts.basis} ({experts.source or experts.kernel})",
        f"host link: {copy.basis} ({copy.source or found.name})",
        f"CPU and DRAM: {host.kind} ({host.source})",
        f"NVMe: assumed ({host.nvme_gb_per_s:g} GB/s)",
        f"attention and dense layers: assumed ({HBM_EFFICIENCY:.0%} of HBM,"
        f" {TFLOPS_EFFICIENCY:.0%} of peak arithmetic)",
    )
    return Rates(model, gpu, host, experts, found, basis, notes, num_gpus)


def torch_kernels(machine: Machine | None, quantised: bool = False) -> bool:
    """Whether a caching plan is timed with torch's kernels: on clusters, and on a GPU beside the
    host that they were measured on; with those of engines elsewhere, and for types of GGUF."""
    return machine is None or (machine.host.name == USUAL_HOST and not quantised)


def rates_on(
    model: ModelSpec,
    gpu: GpuSpec,
    machine: Machine | None = None,
    given: Mapping[str, float] | None = None,
    *,
    quantised: bool = False,
    num_gpus: int = 1,
) -> Rates:
    """Rates of a GPU of a cluster (None) or of a machine, of which `num_gpus` copy at once. given:
    fields of HostSpec that replace what is known of the host."""
    engine = machine is not None and not torch_kernels(machine, quantised)
    rates = engine_rates(model, machine, gpu) if machine is not None and engine else None
    host = HostSpec() if rates is None else rates.host
    if given:
        source = f"given: {', '.join(sorted(given))}; {host.source}"
        host = replace(host, **given, kind="assumed", source=source)  # type: ignore[arg-type]
    if rates is None:
        return build_rates(model, gpu, host, num_gpus=num_gpus)
    return replace(rates, host=host, num_gpus=num_gpus)


def engine_rates(model: ModelSpec, machine: Machine, gpu: GpuSpec | None = None) -> Rates:
    """Rates of a GPU of a machine, by default the first, with kernels such as engines of quantised
    weights have (`offloading.rates`), so that a caching plan differs from theirs by its placement
    alone. The call of a layer on the CPU is spread over the experts of a token."""
    spec = machine.gpus[0] if gpu is None else gpu
    own, cpu = gpu_rates(spec, machine.host.unified), cpu_rates(machine.host, SOCKETS_SHARE)
    calibration = calibration_of_gpu(spec, None, only_type=True)
    per_weight = model.bytes_per_weight("experts")
    source = f"{spec.name} datasheet x assumed efficiencies of engines"
    experts = ExpertGemmModel(
        dtype=model.expert_dtype,
        kernel="engine",
        weight_bytes_per_param=per_weight,
        launch_us=0.0,
        weight_gb_per_s=own.read / 1e9,
        tflops=own.flops / 1e12,
        basis="assumed",
        source=source,
    )
    nvme = machine.host.nvme_gb_per_s or HostSpec().nvme_gb_per_s
    host = HostSpec(
        name=machine.host.name,
        dram_gb=0.0 if machine.host.unified else machine.host.dram_gb,
        dram_gb_per_s=min(cpu.read, cpu.weights * per_weight) / 1e9,
        cpu_us=cpu.call_s * 1e6 / model.real_top_k,
        cpu_tflops=cpu.flops / 1e12,
        nvme_gb=machine.host.nvme_gb or HostSpec().nvme_gb,
        nvme_gb_per_s=nvme,
        kind="assumed",
        source=f"{machine.host.title}, assumed share of its channels and cores",
    )
    copy = calibration.host_copy("h2d", 1)
    notes = (
        f"experts on the GPU: assumed ({source})",
        f"host link: {copy.basis} ({copy.source or calibration.name})",
        f"CPU and DRAM: assumed ({host.source})",
        f"NVMe: assumed ({nvme:g} GB/s)",
        "attention and dense layers: assumed, as the experts",
    )
    share = own.read / (spec.hbm_gb_per_s * 1e9)
    return Rates(
        model,
        spec,
        host,
        experts,
        calibration,
        "assumed",
        notes,
        1,
        share,
        (own.layer_s + model.real_top_k * own.choice_s) * 1e6,
        NO_GRAPH_US if maker(spec) == "NVIDIA" else 0.0,
    )


def step_times(
    rates: Rates,
    max_tokens: int,
    context_tokens: int,
    expert_bytes: npt.NDArray[np.number],
    on_nvme: npt.NDArray[np.bool_] | None = None,
    home_share: float = 1.0,
) -> StepTimes:
    """Time tables for steps of up to `max_tokens` tokens, each with `context_tokens` of context.

    expert_bytes: [L, E] (or a scalar to broadcast) bytes of each expert; on_nvme: [L, E] experts
    that live on NVMe; home_share: share of the tokens whose attention this GPU computes. The GPU
    time of a quantised expert is that of the model's own dtype.
    Attention's quadratic arithmetic in prefill is ignored.
    """
    model = rates.model
    n = np.arange(max_tokens + 1, dtype=np.float64)
    shape = (model.num_moe_layers, model.num_experts)
    size = np.broadcast_to(np.asarray(expert_bytes, np.float64), shape)
    load, host = rates.transfer_s(size), np.zeros(shape)
    if on_nvme is not None:
        load = np.where(on_nvme, rates.nvme_s(size), load)
        host = np.where(on_nvme, rates.read_s(size), host)
    tables = rates.experts.expert_time_us(n, model.expert_hidden, model.moe_intermediate_size)
    moved = rates.transfer_s(np.array(float(max_tokens * model.token_bytes())))
    return StepTimes(
        _gate_s(rates, n * home_share, context_tokens),
        tables * 1e-6,
        rates.cpu_s(n, float(size.max())),
        np.ascontiguousarray(load),
        host,
        _dense_s(rates, model.lm_head_params or model.embedding_params, n * home_share),
        float(2 * moved),
    )


def expert_bytes_of_bits(model: ModelSpec, bits: npt.ArrayLike) -> FloatArray:
    """Bytes of an expert quantised to `bits` a weight, scales included (SCALE_BITS)."""
    return np.asarray(bits, np.float64) * model.expert_params / 8 + (
        model.expert_params * SCALE_BITS / 8
    )


def _gate_s(rates: Rates, n: FloatArray, context_tokens: int) -> FloatArray:
    """[L, M + 1]: from the start of each MoE layer (or of the dense layers before it) to the
    moment when the host knows the chosen experts."""
    model, gpu = rates.model, rates.gpu
    mixing = {layer: kind.params for kind in model.layer_kinds for layer in kind.layer_ids}
    moe, without = set(model.moe_layer_ids), set(model.no_ffn_layer_ids)
    kv_read = (
        n
        * model.kv_bytes(context_tokens)
        / max(1, model.num_hidden_layers)
        / (gpu.hbm_gb_per_s * 1e9 * rates.read_share)
    )
    launch = KERNELS_BEFORE_GATE * gpu.kernel_launch_us * 1e-6
    known = rates.calibration.host_copy("d2h", rates.num_gpus).time_us(np.array(0.0)) * 1e-6
    expert_launch = rates.experts.layer_launch_us(eager=True) * 1e-6
    if rates.layer_us is not None:
        launch, known, expert_launch = rates.layer_us * 1e-6, np.array(0.0), 0.0
    out = np.zeros((model.num_moe_layers, len(n)))
    row = 0
    pending = np.zeros(len(n))
    for layer in range(model.num_hidden_layers):
        pending = pending + _dense_s(rates, mixing.get(layer, 0), n) + kv_read + launch
        if layer not in moe:
            if layer not in without:
                pending = pending + _dense_s(rates, model.dense_ffn_params, n)
            continue
        shared = model.router_params + model.shared_expert_params + model.latent_params
        shared += model.moe_dense_ffns * model.dense_ffn_params
        out[row] = pending + _dense_s(rates, shared, n) + float(known) + expert_launch
        row += 1
        pending = np.zeros(len(n))
    out[:, 0] = 0.0
    return out


def _dense_s(rates: Rates, params: int, n: FloatArray) -> FloatArray:
    """Seconds of dense weights on n tokens: the larger of reading them and the arithmetic."""
    per = bytes_per(WEIGHT_BYTES, rates.model.dense_dtype)
    read = params * per / (rates.gpu.hbm_gb_per_s * 1e9 * rates.read_share)
    peak = rates.gpu.peak_tflops("bf16") * 1e12 * TFLOPS_EFFICIENCY
    return np.where(n > 0, np.maximum(read, 2 * params * n / peak), 0.0)


def _expert_model(calibration: Calibration, dtype: str) -> ExpertGemmModel:
    known = {key[0] for key in calibration.experts}
    return calibration.expert_ffn(dtype if dtype in known else "bf16")

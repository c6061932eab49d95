"""The measured serving rows as deployments and load tests, or why a row is refused.

Source of the rows: github.com/ai-dynamo/aiconfigurator @095f58a (Apache-2.0). How most were taken
is public: its `silicon_sample.csv` names InferenceMAX / InferenceX runs, whose client and launch
scripts are in github.com/SemiAnalysisAI/InferenceX (client and recipes at 0f78cf4eb of 2026-03-27):
prompts of random tokens, lengths uniform in 80 to 100 % of the nominal ones, 10 requests for every
one in flight, the next sent when one ends. For the other rows (Qwen3-235B) only lengths,
concurrency and parallelism are known; the same loop is assumed.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from launched_kernels import with_deepgemm, with_marlin

from moesim.errors import InfeasibleError, MoesimError
from moesim.model.hf_config import spec_from_config
from moesim.model.names import load_model
from moesim.model.spec import ModelSpec
from moesim.serving.deployment import Deployment, deploy
from moesim.serving.engines import EngineProfile
from moesim.serving.speculative import Speculation
from moesim.serving.static import LoadTest

CLUSTERS = {"h100_sxm": "h100-sxm-ib", "h200_sxm": "h200-sxm-ib"}
MODELS = (
    "DeepSeek-R1", "DeepSeek-V3", "GLM-5", "gpt-oss-120b", "Kimi-K2.5", "MiniMax-M2.5",
    "Qwen3-235B", "Qwen3.5-397B-A17B",
)  # fmt: skip
SPECULATION = "speculative decoding not recorded; the recipe's runs with and without are mixed"
QWEN_35 = {
    "model_type": "qwen3_next",
    "num_hidden_layers": 60,
    "full_attention_interval": 4,
    "hidden_size": 4096,
    "intermediate_size": 1024,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 64,
    "linear_value_head_dim": 128,
    "vocab_size": 248320,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


@dataclass(frozen=True)
class Launch:
    """What a public launch script says that the row does not: overrides of `deploy`.

    expert_parallel: the script turns expert parallelism on whatever the recorded size. weights:
    dtype of the checkpoint that was served, where it is not the preset's. kernels: gives a
    deployment expert kernels other than its engine's table has. tight_budget: the token budget is
    the prompt's length and a token for every sequence, see `tight_budget`. balance_steps: of
    `run_load_test`, with attention DP. max_sequences: 0 is the row's concurrency.
    """

    kv_dtype: str = "bf16"
    max_batch_tokens: int | None = None
    memory_fraction: float | None = None
    expert_parallel: bool = False
    weights: str | None = None
    kernels: Callable[[Deployment], Deployment] | None = None
    tight_budget: bool = False
    balance_steps: int = 0
    max_sequences: int | None = None


TRTLLM_DEEPSEEK = Launch(
    "fp8", None, 0.75, expert_parallel=True, tight_budget=True, balance_steps=60
)
LAUNCHES: dict[tuple[str, str], Launch] = {
    ("sglang", "DeepSeek-V3"): Launch(max_batch_tokens=32768, memory_fraction=0.82),
    ("sglang", "DeepSeek-R1"): Launch(max_batch_tokens=32768, memory_fraction=0.82),
    ("sglang", "GLM-5"): Launch(memory_fraction=0.85, weights="fp8"),
    ("sglang", "Qwen3.5-397B-A17B"): Launch("fp8", 16384, 0.8),
    ("trtllm", "DeepSeek-V3"): TRTLLM_DEEPSEEK,
    ("trtllm", "DeepSeek-R1"): TRTLLM_DEEPSEEK,
    ("trtllm", "gpt-oss-120b"): Launch(max_batch_tokens=20000, memory_fraction=0.85),
    ("vllm", "gpt-oss-120b"): Launch(
        max_batch_tokens=8192, memory_fraction=0.9, kernels=with_marlin, max_sequences=0
    ),
    ("vllm", "Qwen3-235B"): Launch(kernels=with_deepgemm),
    ("vllm", "Kimi-K2.5"): Launch(memory_fraction=0.95, max_sequences=0),
    ("vllm", "MiniMax-M2.5 h200_sxm"): Launch(memory_fraction=0.95, expert_parallel=True),
    ("vllm", "MiniMax-M2.5 h100_sxm"): Launch(memory_fraction=0.9, max_sequences=256),
}
RANDOM_RANGE = 0.8
SPECULATED = "measured=2026-01-14"
"""Of the two recipes for DeepSeek-R1 in TensorRT-LLM, with and without multi-token prediction, the
runs of this day had it: their TPOT is 25 to 50 % below that of three other days, which agree within
1 % of each other at every length and concurrency."""


@dataclass(frozen=True)
class Row:
    """One measured row. `concurrency` in flight over the replica; times in milliseconds; `drafts`
    that the recipe has multi-token prediction draft per step."""

    number: int
    engine: str
    version: str
    path: str
    model: str
    system: str
    isl: int
    osl: int
    concurrency: int
    tp: int
    dp: int
    ep: int
    moe_tp: int
    ttft_ms: float
    tpot_ms: float
    refused: str = ""
    drafts: int = 0

    @property
    def group(self) -> str:
        """Model, with the two that are one architecture together."""
        same = {"DeepSeek-R1": "DeepSeek-V3/R1", "DeepSeek-V3": "DeepSeek-V3/R1"}
        return same.get(self.model, self.model)

    @property
    def cold(self) -> bool:
        """Whether the mean TTFT has kernels' compilation in it: TensorRT-LLM compiles DeepGEMM's
        for fp8 blocks as their shapes come, and until 2026-01-13 the client sent nothing to warm
        up."""
        return self.engine == "trtllm" and self.group == "DeepSeek-V3/R1"

    @property
    def measurement(self) -> tuple[float, float]:
        """Rows with the same two times are one measurement listed twice."""
        return round(self.ttft_ms, 6), round(self.tpot_ms, 6)


def read_rows(path: Path) -> list[Row]:
    """All rows of the file, those that cannot be predicted with `refused` set."""
    with path.open(newline="") as file:
        return [_row(i, raw) for i, raw in enumerate(csv.DictReader(file))]


def read_sample(path: Path) -> list[Row]:
    """Rows of aiconfigurator's whole `silicon_sample.csv` of the models, GPUs and mode that
    `read_rows`'s file has: MoE models, one engine on H100s or H200s."""
    with path.open(newline="") as file:
        raw = [r for r in csv.DictReader(file) if r["system"] in CLUSTERS and r["mode"] == "agg"]
    rows = [_row(i, r) for i, r in enumerate(raw)]
    return [row for row in rows if row.model in MODELS]


def _row(number: int, raw: dict[str, str]) -> Row:
    tp, ep, moe_tp = (int(float(raw[c])) for c in ("tp_size", "moe_ep_size", "moe_tp_size"))
    stated_dp = int(float(raw["attention_dp_size"])) if raw["attention_dp_size"] else None
    dp = moe_tp * ep // tp if stated_dp is None else stated_dp
    concurrency = int(float(raw["batch_size"])) * (stated_dp or 1)
    if stated_dp is not None and moe_tp == ep > 1 and tp * dp == moe_tp * ep:
        # A run on t GPUs with TP and EP of t is recorded as t x t.
        tp, dp, moe_tp = (ep, 1, 1) if dp == 1 else (1, ep, 1)
    elif stated_dp is not None and stated_dp > 1 and tp * dp == ep and tp == dp:
        # The recipe has tensor-parallel attention on 4 GPUs, recorded as 4 x 4.
        dp, ep = 1, tp
    model = raw["model_path"].split("/")[-1].removesuffix("-FP8")
    model = "Qwen3-235B" if model.startswith("Qwen3-235B") else model
    refused = ""
    if raw["mode"] != "agg":
        refused = "disaggregated"
    elif raw["pp_size"] not in ("", "1.0", "1"):
        refused = "pipeline parallelism"
    drafts = 0
    if (raw["backend"], model) == ("trtllm", "DeepSeek-R1"):
        source = raw.get("silicon_data_source", "")
        if not source:
            refused = SPECULATION
        elif SPECULATED in source:
            drafts = 1 if dp > 1 else 3
    return Row(
        number=number,
        engine=raw["backend"],
        version=raw["backend_version"],
        path=raw["model_path"],
        model=model,
        system=raw["system"],
        isl=int(raw["isl"]),
        osl=int(raw["osl"]),
        concurrency=concurrency,
        tp=tp,
        dp=dp,
        ep=ep,
        moe_tp=moe_tp,
        ttft_ms=float(raw["silicon_ttft_ms"]),
        tpot_ms=float(raw["silicon_tpot_ms"]),
        refused=refused,
        drafts=drafts,
    )


@cache
def model_of(name: str) -> ModelSpec:
    """The spec behind a row's model name."""
    if name == "Qwen3.5-397B-A17B":
        return spec_from_config(QWEN_35, name, name, "its config.json")
    names = {"Qwen3-235B": "Qwen3-235B-A22B-FP8", "gpt-oss-120b": "GPT-OSS-120B"}
    return load_model(names.get(name, name))


def tight_budget(row: Row) -> int:
    """Tokens of a step in TensorRT-LLM's scripts for DeepSeek-R1 on H200s, `MAX_NUM_TOKENS` of
    `dsr1_fp8_h200_trt_slurm.sh` and `..._mtp_slurm.sh` (SemiAnalysisAI/InferenceX, from 2025-11-01
    to 2026-01-14): one prompt and a step of decoding, rounded up to 64."""
    decoding = row.concurrency
    if row.drafts:
        decoding = (1 + row.drafts) * (row.concurrency // row.dp)
    return (decoding + row.isl + 64 + 63) // 64 * 64


def launch_of(row: Row) -> Launch:
    """The row's launch script, or the engine's defaults."""
    named = LAUNCHES.get((row.engine, f"{row.model} {row.system}"), Launch())
    return LAUNCHES.get((row.engine, row.model), named)


def deployment_of(row: Row, engine: EngineProfile) -> Deployment:
    """The deployment of a row under an engine profile. Raises what `deploy` raises."""
    launch = launch_of(row)
    ep, moe_tp = row.ep, row.moe_tp
    if launch.expert_parallel:
        ep, moe_tp = row.tp * row.dp, 1
    deployment = deploy(
        model_of(row.model),
        CLUSTERS[row.system],
        engine=engine,
        tp=row.tp,
        dp=row.dp,
        ep=ep,
        moe_tp=moe_tp,
        expert_dtype=launch.weights,
        dense_dtype=launch.weights,
        kv_dtype=launch.kv_dtype,
        max_batch_tokens=tight_budget(row) if launch.tight_budget else launch.max_batch_tokens,
        memory_fraction=launch.memory_fraction,
        max_sequences=row.concurrency if launch.max_sequences == 0 else launch.max_sequences,
    )
    return deployment if launch.kernels is None else launch.kernels(deployment)


def load_test_of(row: Row) -> LoadTest:
    """The closed loop that measured a row."""
    return LoadTest(row.isl, row.osl, row.concurrency, range_ratio=RANDOM_RANGE)


def refusal(row: Row, engine: EngineProfile) -> str:
    """Why a row cannot be predicted, "" where it can."""
    if row.refused:
        return row.refused
    try:
        deployment = deployment_of(row, engine)
        from moesim.serving.memory import require_fit

        require_fit(deployment, row.isl + row.osl)
    except InfeasibleError as error:
        return f"does not fit: {error.cause}"
    except MoesimError as error:
        return error.cause
    return ""


def speculation_of(row: Row) -> Speculation | None:
    """Multi-token prediction as the recipe drafts, its acceptance moesim's default: no row says it,
    and none is used to find it."""
    return Speculation(max_drafts=row.drafts, fixed=True) if row.drafts else None

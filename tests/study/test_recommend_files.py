"""The files that start a recommendation: options of three engines, and placements."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np

from moesim.exporters.launch import sglang, trtllm, vllm
from moesim.exporters.launch.base import Role, Service
from moesim.serving.engines import engine_profile
from moesim.studies.recommend.files import launch_files
from moesim.studies.recommend.need import need_of
from moesim.studies.recommend.shapes import Place
from tests.builders import random_trace, toy_model

CLUSTER = "h200-sxm-ib"


def service(**changes: object) -> Service:
    one = {
        "tp": 1, "dp": 16, "ep": 16, "moe_tp": 1, "kv_dtype": "fp8", "max_batch_tokens": 8192,
        "max_sequences": 256, "memory_fraction": 0.9, "gpus_per_node": 8,
    }  # fmt: skip
    roles = [
        Role("prefill", 2, **(one | {"dp": 8, "ep": 8, "moe_comm": "deepep"})),
        Role("decode", 1, **(one | {"moe_comm": "deepep_ll"} | changes)),
    ]
    return Service("org/model", roles, 50.0, 1000.0, 300.0, 256)


def test_launch_lines_of_vllm() -> None:
    files = vllm.files(service())
    decode = files["decode.sh"].splitlines()
    for line in (
        "vllm serve org/model \\",
        "  --data-parallel-size 16 \\",
        "  --enable-expert-parallel \\",
        "  --all2all-backend deepep_low_latency \\",
        "  --kv-cache-dtype fp8 \\",
        "  --data-parallel-size-local 8 \\",
        '  --data-parallel-address "$HEAD" \\',
    ):
        assert line in decode
    assert '  --data-parallel-start-rank "$((NODE_RANK * 8))"' in files["decode-other-nodes.sh"]
    assert "prefill-other-nodes.sh" not in files
    assert files["router.sh"].count("--prefill http") == 2
    assert "  --request-rate 50 \\" in files["bench.sh"].splitlines()


def test_launch_lines_of_sglang_count_all_ranks_together() -> None:
    """8,192 tokens and 256 sequences of each of 16 ranks: 131,072 and 4,096."""
    decode = sglang.files(service())["decode.sh"].splitlines()
    for line in (
        "  --tp-size 16 \\",
        "  --attn-dp-size 16 \\",
        "  --chunked-prefill-size 131072 \\",
        "  --max-running-requests 4096 \\",
        "  --deepep-mode low_latency \\",
        "  --disaggregation-mode decode \\",
        "  --nnodes 2 \\",
    ):
        assert line in decode


def test_overlap_and_redundant_experts_are_told_to_the_engines() -> None:
    """32 experts beyond 256: 288 slots for TensorRT-LLM, which counts slots."""
    more = service(two_batch_overlap="decode", redundant_experts=32)
    lines = vllm.files(more)["decode.sh"].splitlines()
    assert "  --enable-dbo \\" in lines
    assert """  --eplb-config '{"num_redundant_experts": 32}' \\""" in lines
    lines = sglang.files(more)["decode.sh"].splitlines()
    assert "  --enable-two-batch-overlap \\" in lines
    assert "  --ep-num-redundant-experts 32 \\" in lines
    assert "num_slots: 288" in trtllm.files(more)["decode.yaml"]
    assert "--enable-dbo" not in vllm.files(more)["prefill.sh"]


def test_stages_and_drafts_are_told_to_the_engines() -> None:
    """16 GPUs in two stages over two nodes, and one drafted token."""
    one = {
        "tp": 8, "dp": 1, "ep": 8, "moe_tp": 1, "kv_dtype": "bf16", "max_batch_tokens": 8192,
        "max_sequences": 256, "memory_fraction": 0.9, "gpus_per_node": 8, "pp": 2,
        "moe_comm": "all_reduce",
    }  # fmt: skip
    staged = Service("org/model", [Role("serving", 1, **one)], 50.0, 1000.0, 300.0, 256)
    files = vllm.files(staged)
    assert "  --pipeline-parallel-size 2 \\" in files["serving.sh"].splitlines()
    assert "  --nnodes 2 \\" in files["serving.sh"].splitlines()
    assert '--node-rank "$NODE_RANK"' in files["serving-other-nodes.sh"]
    lines = sglang.files(staged)["serving.sh"].splitlines()
    assert {"  --tp-size 8 \\", "  --pp-size 2 \\", "  --nnodes 2 \\"} <= set(lines)
    assert "--tp_size 8" in trtllm.files(staged)["serving.sh"]
    assert "--pp_size 2" in trtllm.files(staged)["serving.sh"]
    drafting = replace(service(), drafts=1)
    assert '"num_speculative_tokens": 1' in vllm.files(drafting)["prefill.sh"]
    assert "--speculative-num-draft-tokens 2" in sglang.files(drafting)["decode.sh"]
    files = trtllm.files(drafting)
    assert "max_draft_len: 1" in files["decode.yaml"]
    assert "speculative_config" not in files["prefill.yaml"]


def test_a_trace_gives_a_placement_to_engines_that_load_one() -> None:
    """2 layers of 8 experts and 4 redundant ones on 4 expert-parallel ranks: 12 slots each."""
    model = toy_model(2, 8, 2)
    trace = random_trace(np.random.default_rng(0), 512, 2, 8, 2)
    need = need_of("ttft<1s", 5.0, 1000, 200, None, 0)
    role = {
        "engines": 1, "tp": 1, "dp": 4, "ep": 4, "moe_tp": 1, "moe_comm": "deepep", "pp": 1,
        "kv_dtype": "bf16", "max_batch_tokens": 8192, "max_sequences": 256, "gpu": "h200-sxm",
        "memory_fraction": 0.9, "two_batch_overlap": "off", "redundant_experts": 4,
    }  # fmt: skip
    option = {"roles": {"serving": role}, "requests_per_s": 5.0}
    answer = {"options": [option], "cluster": CLUSTER, "decode_cluster": "", "speculation": None}
    found = {}
    for engine in ("sglang", "vllm"):
        place = Place(model, CLUSTER, engine_profile(engine), {"trace": trace})
        found[engine], _ = launch_files(answer | {"engine": engine}, need, "org/model", place)
    said = "the engine loads no placement of experts from a file"
    assert said in found["vllm"]["serving.sh"]
    assert "--init-expert-location placement-serving.json" in found["sglang"]["serving.sh"]
    assert "--enable-eplb" not in found["sglang"]["serving.sh"]
    table = json.loads(found["sglang"]["placement-serving.json"])["physical_to_logical_map"]
    assert [len(row) for row in table] == [12] * 2
    assert all(set(row) == set(range(8)) for row in table)


def test_settings_of_tensorrt_llm() -> None:
    import yaml

    files = trtllm.files(service())
    decode = yaml.safe_load(files["decode.yaml"])
    assert decode["enable_attention_dp"] is True
    assert decode["kv_cache_config"] == {"dtype": "fp8", "free_gpu_memory_fraction": 0.9}
    front = yaml.safe_load(files["disagg.yaml"])
    assert front["context_servers"]["num_instances"] == 2
    assert "disable_overlap_scheduler" in yaml.safe_load(files["prefill.yaml"])
    assert "--tp_size 16" in files["decode.sh"]

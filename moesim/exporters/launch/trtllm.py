"""TensorRT-LLM: `trtllm-serve`, its disaggregated server, its benchmark. Options and settings as in
github.com/NVIDIA/TensorRT-LLM: tensorrt_llm/commands/serve.py, llmapi/llm_args.py (in part) and
serve/scripts/benchmark_serving.py, and its documentation (features/disagg-serving)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moesim.exporters.launch.base import (
    FRONT,
    Files,
    Role,
    Service,
    bench_script,
    script,
    urls,
    where,
)

SERVERS = {"prefill": "context_servers", "decode": "generation_servers"}


def files(service: Service) -> Files:
    """A script and a settings file per role, one for the front, one for the benchmark."""
    import yaml

    out: dict[str, str] = {}
    for role in service.roles:
        out[f"{role.role}.yaml"] = yaml.safe_dump(_settings(service, role), sort_keys=True)
        out[f"{role.role}.sh"] = _engine(service, role)
    if service.split:
        front: dict[str, Any] = {"hostname": "localhost", "port": int(FRONT), "backend": "pytorch"}
        for role in service.roles:
            addresses = [url.removeprefix("http://") for url in urls(role)]
            front[SERVERS[role.role]] = {"num_instances": role.engines, "urls": addresses}
        out["disagg.yaml"] = yaml.safe_dump(front, sort_keys=False)
        out["router.sh"] = script(
            ["the addresses in disagg.yaml are yours to put in"],
            [["trtllm-serve", "disaggregated", "-c", "disagg.yaml"]],
        )
    tested = service if service.split else replace(service, rate=service.rate / _engines(service))
    bench = [
        "python", "-m", "tensorrt_llm.serve.scripts.benchmark_serving",
        "--model", service.model,
        "--port", FRONT if service.split else str(service.roles[0].port),
        "--dataset-name", "random",
        "--random-input-len", f"{service.prompt:.0f}",
        "--random-output-len", f"{service.output:.0f}",
        "--request-rate", f"{tested.rate:g}", "--random-ids", "--tokenize-on-client",
        "--ignore-eos", "--metric-percentiles", "50,90,99",
    ]  # fmt: skip
    needs = ["tests the promise"]
    if not service.split and _engines(service) > 1:
        needs = [f"tests one of {_engines(service)} engines with its share of the requests"]
    save = ["--save-result", "--result-filename", "bench.json"]
    out["bench.sh"] = bench_script(tested, bench, "--num-prompts", "--seed", save, needs)
    return out


def _engines(service: Service) -> int:
    return service.roles[0].engines


def _settings(service: Service, role: Role) -> dict[str, Any]:
    cache: dict[str, Any] = {"free_gpu_memory_fraction": role.memory_fraction}
    if role.kv_dtype != "bf16":
        cache["dtype"] = role.kv_dtype
    out: dict[str, Any] = {
        "enable_attention_dp": role.dp > 1,
        "kv_cache_config": cache,
        "enable_chunked_prefill": True,
    }
    slots = service.num_experts + role.redundant_experts
    if role.placement:
        out["moe_config"] = {"backend": "WIDEEP", "load_balancer": role.placement}
    elif role.redundant_experts:
        balanced = {"num_slots": slots, "layer_updates_per_iter": 1}
        out["moe_config"] = {"backend": "WIDEEP", "load_balancer": balanced}
    if service.drafts and role.role != "prefill":
        out["speculative_config"] = {"decoding_type": "MTP", "max_draft_len": service.drafts}
    if service.split:
        out["cache_transceiver_config"] = {
            "backend": "DEFAULT",
            "max_tokens_in_buffer": max(2048, role.max_batch_tokens),
        }
        if role.role == "prefill":
            out["disable_overlap_scheduler"] = True
    return out


def _engine(service: Service, role: Role) -> str:
    command = [
        "trtllm-serve", service.model,
        "--tp_size", str(role.tp * role.dp), "--ep_size", str(role.ep),
        "--max_batch_size", str(role.max_sequences), "--max_num_tokens", str(role.max_batch_tokens),
        "--extra_llm_api_options", f"{role.role}.yaml",
        "--host", "0.0.0.0", "--port", str(role.port),
    ]  # fmt: skip
    if role.pp > 1:
        command += ["--pp_size", str(role.pp)]
    if role.num_nodes > 1:
        command = ["trtllm-llmapi-launch", *command]
    return script(where(role), [command])

"""vLLM: `vllm serve`, its router, `vllm bench serve`. Checked with 0.33.0, vllm-router 0.1.17."""

from __future__ import annotations

import json

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

ALL2ALL = {
    "all_gather": "allgather_reducescatter",
    "deepep": "deepep_high_throughput",
    "deepep_ll": "deepep_low_latency",
    "nvlink": "flashinfer_nvlink_two_sided",
    "nvlink_one_sided": "flashinfer_nvlink_one_sided",
}
RPC_PORT = "13345"


def files(service: Service) -> Files:
    """A script per role, one for the router where there are several engines, one for the
    benchmark."""
    out: dict[str, str] = {}
    for role in service.roles:
        out |= _engine(service, role)
    if not service.alone:
        out["router.sh"] = _router(service)
    bench = [
        "vllm", "bench", "serve", "--model", service.model, "--port", service.front,
        "--dataset-name", "random",
        "--random-input-len", f"{service.prompt:.0f}",
        "--random-output-len", f"{service.output:.0f}",
        "--request-rate", f"{service.rate:g}", "--ignore-eos",
        "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99",
    ]  # fmt: skip
    save = ["--save-result", "--result-filename", "bench.json"]
    out["bench.sh"] = bench_script(service, bench, "--num-prompts", "--seed", save)
    return out


def _engine(service: Service, role: Role) -> Files:
    out = {}
    command = ["vllm", "serve", service.model, "--tensor-parallel-size", str(role.tp)]
    if role.pp > 1:
        command += ["--pipeline-parallel-size", str(role.pp)]
    if role.dp > 1:
        command += ["--data-parallel-size", str(role.dp)]
    if role.ep > 1:
        command.append("--enable-expert-parallel")
    if role.moe_comm in ALL2ALL:
        command += ["--all2all-backend", ALL2ALL[role.moe_comm]]
    if role.two_batch_overlap != "off":
        command.append("--enable-dbo")
    if role.redundant_experts:
        balance = json.dumps({"num_redundant_experts": role.redundant_experts})
        command += ["--enable-eplb", "--eplb-config", balance]
    command += [
        "--max-num-batched-tokens", str(role.max_batch_tokens),
        "--max-num-seqs", str(role.max_sequences),
        "--gpu-memory-utilization", f"{role.memory_fraction:g}",
    ]  # fmt: skip
    if role.kv_dtype != "bf16":
        command += ["--kv-cache-dtype", role.kv_dtype]
    if service.drafts:
        drafting = {"method": "mtp", "num_speculative_tokens": service.drafts}
        command += ["--speculative-config", json.dumps(drafting)]
    if service.split:
        transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
        command += ["--kv-transfer-config", json.dumps(transfer)]
    if role.num_nodes > 1 and role.pp > 1:
        nodes = ["--nnodes", str(role.num_nodes), "--master-addr", "$HEAD"]
        other = [*command, *nodes, "--headless", "--node-rank", "$NODE_RANK"]
        out[f"{role.role}-other-nodes.sh"] = script(where(role), [other])
        command += [*nodes, "--node-rank", "0"]
    elif role.num_nodes > 1:
        local = role.dp // role.num_nodes
        command += ["--data-parallel-size-local", str(local)]
        command += ["--data-parallel-address", "$HEAD", "--data-parallel-rpc-port", RPC_PORT]
        other = [*command, "--headless", "--data-parallel-start-rank", f"$((NODE_RANK * {local}))"]
        out[f"{role.role}-other-nodes.sh"] = script(where(role), [other])
    out[f"{role.role}.sh"] = script(where(role), [[*command, "--port", str(role.port)]])
    return out


def _router(service: Service) -> str:
    command = ["vllm-router", "--port", FRONT]
    if service.split:
        command.append("--vllm-pd-disaggregation")
        for role in service.roles:
            for url in urls(role):
                command += [f"--{role.role}", url]
    else:
        command += ["--worker-urls", *urls(service.roles[0])]
    return script(["the addresses are yours to put in"], [command])

"""SGLang: `sglang.launch_server`, its router, its benchmark. Checked with 0.5.23 and sglang-router
0.3.2."""

from __future__ import annotations

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

A2A = {"all_gather": "none", "deepep": "deepep", "deepep_ll": "deepep", "deepep_auto": "deepep"}
DEEPEP_MODE = {"deepep": "normal", "deepep_ll": "low_latency", "deepep_auto": "auto"}


def files(service: Service) -> Files:
    """A script per role, one for the router where there are several engines, one for the
    benchmark."""
    out = {f"{role.role}.sh": _engine(service, role) for role in service.roles}
    if not service.alone:
        out["router.sh"] = _router(service)
    bench = [
        "python", "-m", "sglang.benchmark.serving", "--backend", "sglang",
        "--port", service.front,
        "--model", service.model, "--dataset-name", "random",
        "--random-input-len", f"{service.prompt:.0f}",
        "--random-output-len", f"{service.output:.0f}", "--random-range-ratio", "1",
        "--request-rate", f"{service.rate:g}",
    ]  # fmt: skip
    save = ["--output-file", "bench.jsonl"]
    out["bench.sh"] = bench_script(service, bench, "--num-prompts", "--seed", save)
    return out


def _engine(service: Service, role: Role) -> str:
    """Tensor parallelism counts all GPUs, attention's data parallelism divides them; chunks and
    running requests are of all data-parallel ranks together."""
    command = [
        "python", "-m", "sglang.launch_server", "--model-path", service.model,
        "--tp-size", str(role.tp * role.dp),
    ]  # fmt: skip
    if role.pp > 1:
        command += ["--pp-size", str(role.pp)]
    if role.dp > 1:
        command += ["--attn-dp-size", str(role.dp)]
    if role.ep > 1:
        command += ["--ep-size", str(role.ep)]
    if role.moe_comm in A2A and role.ep > 1:
        command += ["--moe-a2a-backend", A2A[role.moe_comm]]
    if role.moe_comm in DEEPEP_MODE:
        command += ["--deepep-mode", DEEPEP_MODE[role.moe_comm]]
    if role.two_batch_overlap != "off":
        command.append("--enable-two-batch-overlap")
    if role.redundant_experts:
        command += ["--ep-num-redundant-experts", str(role.redundant_experts)]
    if role.placement:
        command += ["--init-expert-location", role.placement]
    elif role.redundant_experts:
        command.append("--enable-eplb")
    command += [
        "--chunked-prefill-size", str(role.max_batch_tokens * role.dp),
        "--max-running-requests", str(role.max_sequences * role.dp),
        "--mem-fraction-static", f"{role.memory_fraction:g}",
    ]  # fmt: skip
    if role.kv_dtype != "bf16":
        command += ["--kv-cache-dtype", "fp8_e4m3" if role.kv_dtype == "fp8" else role.kv_dtype]
    if service.drafts:
        drafts = service.drafts
        command += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(drafts)]
        command += ["--speculative-eagle-topk", "1"]
        command += ["--speculative-num-draft-tokens", str(drafts + 1)]
    if service.split:
        command += ["--disaggregation-mode", role.role]
        command += ["--disaggregation-transfer-backend", "nixl"]
    if role.num_nodes > 1:
        command += ["--nnodes", str(role.num_nodes), "--node-rank", "$NODE_RANK"]
        command += ["--dist-init-addr", "$HEAD:5000"]
    command += ["--host", "0.0.0.0", "--port", str(role.port)]
    return script(where(role), [command])


def _router(service: Service) -> str:
    command = ["python", "-m", "sglang_router.launch_router", "--port", FRONT]
    if service.split:
        command.append("--pd-disaggregation")
        for role in service.roles:
            for url in urls(role):
                command += [f"--{role.role}", url]
    else:
        command += ["--worker-urls", *urls(service.roles[0])]
    return script(["the addresses are yours to put in"], [command])

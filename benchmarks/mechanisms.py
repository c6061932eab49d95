"""Headlines of papers beside what this model of a deployment gives, on real routing traces.

Every row is computed here: `claim` is what the paper's abstract says, `ours` the figure of our
traces and machines, `why` what makes the two differ. Writes `reports/mechanisms/`: results.json and
README.md. `--only` runs some of the sections anew and keeps the others' rows. Usage, about fifteen
minutes on two cores:

    python -m benchmarks.mechanisms --data ../shared/data --out reports/mechanisms
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import moesim
from benchmarks import mechanisms_reports, mechanisms_serving
from benchmarks.mechanisms_row import Row
from moesim.cluster import load_cluster
from moesim.cost.routing import home_ranks, route
from moesim.files import atomic_write
from moesim.jobs.cache_exact import exact_bits
from moesim.jobs.simulate_result import SimReport
from moesim.model.names import load_model
from moesim.placement import Placement
from moesim.routing.api import reroute
from moesim.sim.collectives.registry import build_exchange
from moesim.sim.result import SimResult
from moesim.trace.batches import draw_batches, index_requests
from moesim.trace.format import Trace, load_token_trace

OLMOE = "sample:debian-olmoe"


@dataclass(frozen=True)
class Traces:
    gpt_oss: Trace
    deepseek: Trace
    olmoe: Trace


def step_us(report: SimReport) -> dict[str, float]:
    """Mean microseconds of a step by placement."""
    return {name: float(result.step_us.mean()) for name, result in report.results.items()}


def mean_balance(result: SimResult) -> float:
    return float(result.balancedness.mean())


def exchange_share(result: SimResult) -> float:
    """Of a step, dispatch and combine."""
    parts = result.breakdown_us()
    return (parts.get("dispatch", 0.0) + parts.get("combine", 0.0)) / float(result.step_us.mean())


def exflow_and_moetuner(traces: Traces) -> Iterator[Row]:
    one = reroute(traces.gpt_oss, "k:k=1").trace
    for gpus, nodes in ((8, "1 node"), (16, "2 nodes")):
        for trace, k in ((traces.gpt_oss, 4), (one, 1)):
            common = {"gpus": gpus, "all_to_all": "nccl", "phase": "decode", "moe_only": True}
            plain = moesim.simulate(trace, **common).results["linear"]
            found = moesim.simulate(
                trace, schedule="context-coherent", compare=["exflow", "moetuner"], **common
            ).results
            setting = f"gpt-oss-20b, top-{k}, decode of 256 tokens, {gpus} H100s, {nodes}"
            yield from _beside(plain, found, k, setting)


def _beside(plain: SimResult, found: dict[str, SimResult], k: int, setting: str) -> Iterator[Row]:
    """A row each of ExFlow and MoETuner; their reasons are this setting's own figures."""
    us = {name: float(result.step_us.mean()) for name, result in found.items()}
    alone = float(plain.step_us.mean())
    moved = {name: float(result.link_bytes.sum()) for name, result in found.items()}
    even = {name: mean_balance(result) for name, result in found.items()}
    stays = (
        "one choice per token: what stays on its GPU need not be sent"
        if k == 1
        else f"{k} choices per token are on several GPUs wherever the token stays"
    )
    yield Row(
        "ExFlow",
        "arXiv:2401.08383, abstract",
        "up to 2.2x throughput over DeepSpeed-MoE; up to 67% less cross-GPU routing",
        f"MoE part {alone / us['exflow']:.2f}x as fast as sequential with experts in order, the"
        f" schedule alone {alone / us['linear']:.2f}x; bytes over links"
        f" {moved['exflow'] / moved['linear'] - 1:+.0%} by its placement",
        setting,
        f"{stays}; dispatch and combine are {exchange_share(plain):.0%} of the sequential MoE part,"
        f" which bounds the gain, and the placement ignores load (balancedness"
        f" {even['linear']:.2f} to {even['exflow']:.2f})",
    )
    yield Row(
        "MoETuner",
        "arXiv:2502.06643, abstract",
        "9.3% (one node) and 17.5% (several nodes) end to end",
        f"{us['linear'] / us['moetuner'] - 1:+.1%} against experts in order, both context-coherent;"
        f" bytes over links {moved['moetuner'] / moved['linear'] - 1:+.0%}",
        setting,
        f"of the MoE part alone. Load is more even (balancedness {even['linear']:.2f} to"
        f" {even['moetuner']:.2f}), but in decode an expert costs the reading of its weights,"
        " however many tokens it has; dispatch and combine are"
        f" {exchange_share(found['linear']):.0%} of the step",
    )


def even_messages(gpus: int, tokens: int, top_k: int) -> np.ndarray:
    """[G, G] messages where every token goes to distinct GPUs, all as likely."""
    rng = np.random.default_rng(0)
    out = np.zeros((gpus, gpus), np.int32)
    for source in range(gpus):
        for _ in range(tokens):
            out[source, rng.choice(gpus, min(top_k, gpus), replace=False)] += 1
    np.fill_diagonal(out, 0)
    return out


def hierarchical(traces: Traces) -> Iterator[Row]:
    """Dispatch of even traffic: flat against two-level, by size and tokens per GPU."""
    from moesim.cost.routing import Routed

    model = load_model("qwen3-30b-a3b")
    cells = []
    for gpus in (16, 64, 256):
        cluster = load_cluster("h200-sxm-ib", gpus)
        exchanges = {
            name: build_exchange(name, cluster, model, phase="decode")[2]
            for name in ("nccl", "two-level")
        }
        for tokens in (1, 16, 256):
            none = np.zeros((1, 1), np.int64)
            routed = Routed(
                np.zeros((1, 1, gpus), np.int32),
                even_messages(gpus, tokens, 8)[None, None],
                none,
                none,
                np.array([gpus * tokens]),
            )
            us = {
                name: sum(float(s.us[0, 0]) for s in exchange.dispatch(routed))
                for name, exchange in exchanges.items()
            }
            cells.append(f"{gpus} GPUs x {tokens}: {us['nccl'] / us['two-level']:.2f}x")
    yield Row(
        "Tutel, 2DH all-to-all",
        "arXiv:2206.03382, abstract of an earlier version",
        "up to 20.7x over the flat one on 2,048 GPUs",
        "; ".join(cells),
        "Qwen3-30B-A3B, even traffic, GPUs x tokens per GPU, H200s in nodes of 8",
        "each GPU of another node is assumed to cost 0.13 us, as DeepEP's kernels were measured to"
        " take; a library whose messages cost more gains more. Bytes cross NVLink once more, which"
        " decides where messages are large",
    )


def bi_level(traces: Traces) -> Iterator[Row]:
    cluster = load_cluster("h100-sxm-ib", 32)
    model = load_model("debian-olmoe")
    trace = traces.olmoe
    index, _ = index_requests(trace, "prefill")
    batches = draw_batches(index, "prefill", 16_384, 4, 0)
    table = np.tile(np.arange(trace.num_experts, dtype=np.int32), (trace.num_layers, 1))
    placement = Placement(table, 32, 4, trace.num_experts)
    us = {}
    for name in ("nccl", "bi-level", "deepep"):
        exchange = build_exchange(name, cluster, model, phase="prefill")[2]
        home = home_ranks(trace, batches, 32)
        routed = route(trace, batches, placement, dedup=exchange.dedup, home=home)
        stages = [*exchange.dispatch(routed), *exchange.combine(routed)]
        us[name] = sum(float(s.us.mean()) for s in stages)
    yield Row(
        "SMILE, bi-level routing",
        "arXiv:2212.05191, abstract",
        "2.5x pretraining throughput over Switch Transformer",
        f"dispatch and combine of a layer {us['nccl'] / us['bi-level']:.2f}x as fast as flat"
        f" ({us['bi-level']:.0f} against {us['nccl']:.0f} us; DeepEP {us['deepep']:.0f} us)",
        "debian-olmoe, prefill of 16,384 tokens, 32 H100s of 4 nodes",
        "tokens of top-8 go to several nodes, SMILE's to one; its cluster and model are others, and"
        " it trains",
    )


def bigmac(traces: Traces) -> Iterator[Row]:
    for phase in ("prefill", "decode"):
        whole, narrow = (
            moesim.simulate(OLMOE, gpus=32, phase=phase, all_to_all="nccl", reduce=part).results[
                "linear"
            ]
            for part in (1.0, 0.25)
        )
        share = exchange_share(whole)
        faster = float(whole.step_us.mean() / narrow.step_us.mean())
        why = (
            "three quarters of the bytes are gone and two projections are added; attention and"
            " experts remain, and its models and machines are others"
            if phase == "prefill"
            else "messages are small: the all-to-all is latency, which fewer bytes do not shorten,"
            " and two projections are added"
        )
        yield Row(
            "BigMac",
            "arXiv:2502.16927, abstract",
            "3.09x training latency, 3.11x inference throughput",
            f"step {faster:.2f}x as fast with a quarter of the hidden size exchanged",
            f"debian-olmoe, {phase}, 32 H100s of 4 nodes, flat all-to-all, experts of as many"
            " weights, four times as wide",
            f"dispatch and combine are {share:.0%} of the step with whole rows; {why}",
        )


def capacity(traces: Traces) -> Iterator[Row]:
    for factor in (1.0, 1.5):
        done = moesim.reroute(
            traces.deepseek, f"drop:factor={factor}", gpus=8, model="DeepSeek-V2-Lite"
        )
        before, after = done.before["step_us"].value, done.after["step_us"].value
        yield Row(
            "Capacity-aware inference, token drop",
            "arXiv:2503.05066, abstract and project page",
            "30% faster MoE layer at 0.9% degradation (OLMoE); expanded drop 1.85x (Mixtral; 1.94x"
            " in version 1)",
            f"MoE part {before / after:.2f}x as fast, {done.changes.gate_mass_kept:.1%} of gates"
            " kept",
            f"deepseek-v2-lite, factor {factor:g}, prefill of 4,096 tokens, 8 H100s",
            "experts of a GPU even each other out, so that the busiest GPU is nearer to the mean"
            " than the busiest expert, and dispatch and combine remain",
        )


def openmoe(traces: Traces) -> Iterator[Row]:
    late = {
        keep: reroute(traces.olmoe, f"drop:factor=1,keep={keep}").changes.notes[
            "dropped_late_share"
        ]
        for keep in ("position", "random")
    }
    yield Row(
        "OpenMoE, drop towards the end",
        "arXiv:2402.01739, abstract",
        "tokens late in a sequence are more likely to be dropped",
        f"{late['position']:.0%} of drops in the later half, {late['random']:.0%} at random",
        "debian-olmoe, capacity factor 1",
        "the trend appears where experts fill in order of position; dropping by score or at random"
        " does not show it",
    )


def fewer_experts(traces: Traces) -> Iterator[Row]:
    """Rules that give tokens fewer experts: what share of choices, and of gate mass, remains."""
    trace, k = traces.deepseek, traces.deepseek.top_k
    asked = (
        (
            "AdaMoE, null experts",
            "arXiv:2406.13233, abstract",
            "14.5% fewer FLOPs, +1.69% accuracy (Mixtral, ARC-C, fine-tuned)",
            f"null:mean={k * (1 - 0.145):.3f}",
            "the share is set, not found: what we can say is the gate mass that it costs an"
            " untrained router",
        ),
        (
            "Harder Tasks Need More Experts, top-p",
            "arXiv:2403.07652, abstract",
            "less than 90% of the activated parameters of top-2, +0.7% on average",
            "top-p:p=0.9",
            "its router is trained for it, on two experts of few; here six of 64 were chosen with"
            " flat weights, so that a share of 0.9 needs most of them",
        ),
        (
            "MC-MoE, online dynamic pruning",
            "arXiv:2410.06270, abstract",
            "15% fewer activated parameters, less than 0.6% performance drop",
            "prune-tokens:quantile=0.18",
            "the share is set to its 15%: 18% of tokens keep one expert, of six where Mixtral's"
            " have two",
        ),
    )
    for system, source, claim, rule, why in asked:
        c = reroute(trace, rule).changes
        ours = (
            f"{1 - c.choices_after / c.choices:.1%} fewer choices,"
            f" {c.gate_mass_kept:.1%} of gate mass kept"
        )
        yield Row(system, source, claim, ours, f"deepseek-v2-lite, `{rule}`", why)


def merging(traces: Traces) -> Iterator[Row]:
    """MC-SMoE at the memory that it claims: 64 experts to 13 are 80% fewer."""
    c = reroute(traces.deepseek, "merge:keep=13").changes
    yield Row(
        "MC-SMoE, merging by routing",
        "arXiv:2310.01334, abstract",
        "up to 80% less memory and 20% fewer FLOPs, nearly no loss",
        f"80% of experts gone, {1 - c.choices_after / c.choices:.1%} fewer choices (those that fall"
        f" together); {c.gate_mass_kept:.1%} of gate mass stays with its own expert",
        "deepseek-v2-lite, `merge:keep=13`",
        "what merged weights are worth no trace can say",
    )


def bits(traces: Traces) -> Iterator[Row]:
    from moesim.caching.bits import assumed_errors, loss_table, significance
    from moesim.trace.batches import split_requests

    trace = traces.deepseek
    tune, _ = split_requests(index_requests(trace)[0])
    worth = significance(trace, tune)
    loss = loss_table(worth, assumed_errors(worth.shape))
    chosen, row = exact_bits(loss, 2.54)
    flat = loss[:, :, 1].sum()
    model = load_model("mixtral-8x7b")
    experts = model.num_moe_layers * model.num_experts * model.expert_bytes()
    whole = experts + model.non_expert_bytes()
    saved = 1 - (experts * 2.54 / 16 + model.non_expert_bytes()) / whole
    yield Row(
        "MC-MoE, mixed precision",
        "arXiv:2410.06270, abstract",
        "76.6% of the model compressed at 2.54 bits (Mixtral 8x7B), 3.8% average accuracy loss",
        f"Mixtral's weights {saved:.1%} smaller with its experts at 2.54 bits; weighted error"
        f" {row['integer_program'] / flat:.2f} of that of 2 bits everywhere by the integer program"
        f" ({row['own'] / flat:.2f} greedy)",
        "size: Mixtral 8x7B; error: deepseek-v2-lite, 2.54 bits on average, errors assumed 4^-bits",
        "scales and zero points of its groups are not counted here; other layers stay in 16 bits,"
        " where its repository's scripts give attention 4",
    )
    assert abs(chosen.mean() - 2.54) < 0.05


def schedules(traces: Traces) -> Iterator[Row]:
    common = {"gpus": 32, "phase": "prefill", "batch_tokens": 65_536, "steps": 4}
    us = {
        name: step_us(moesim.simulate(OLMOE, all_to_all="two-level", schedule=name, **common))
        for name in ("sequential", "pipelined", "co-scheduled")
    }
    plain, chunked, both = (us[n]["linear"] for n in ("sequential", "pipelined", "co-scheduled"))
    setting = "debian-olmoe, prefill of 65,536 tokens, 32 H100s of 4 nodes, two-level all-to-all"
    yield Row(
        "Tutel, adaptive pipelining",
        "arXiv:2206.03382, abstract of an earlier version",
        "up to 2.00x of a single MoE layer",
        f"step {plain / chunked:.2f}x as fast, degree chosen from 1, 2, 4, 8",
        setting,
        "of a whole step, attention included; the lesser of the two parts that overlap bounds it",
    )
    yield Row(
        "FSMoE, intra-node beside inter-node traffic",
        "arXiv:2501.10714, abstract",
        "1.18x to 1.22x over DeepSpeed-MoE and Tutel on MoE layers",
        f"step {chunked / both:.2f}x as fast as pipelined",
        setting,
        "of a whole forward step; its gradients, which it overlaps as well, are not in inference",
    )


SECTIONS: tuple[Callable[[Traces], Iterator[Row]], ...] = (
    exflow_and_moetuner,
    hierarchical,
    bi_level,
    bigmac,
    capacity,
    openmoe,
    fewer_experts,
    merging,
    bits,
    schedules,
    *mechanisms_serving.SECTIONS,
    *mechanisms_reports.SECTIONS,
)

HEAD = """# Headlines beside ours

What papers say of their systems, and what this project's model gives for the same mechanism on real
routing traces and calibrated machines. Those that cannot be judged say why. Claims are from
abstracts and project pages, as named; the papers' own experiments are of other models and machines,
and many are of training. Gate mass kept is no accuracy. Times are predictions: of 8 GPUs from
measured figures, of several nodes partly from assumed ones (docs/calibration.md). Regenerate with:

    python -m benchmarks.mechanisms --data ../shared/data --out reports/mechanisms

| system | claim | ours | setting | why they differ |
|---|---|---|---|---|
"""

TAIL = (Path(__file__).parent / "mechanisms_tail.md").read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="sections by the names of their functions, with commas")
    given = parser.parse_args()
    kept: dict[str, list[dict[str, str]]] = {}
    if given.only:
        kept = json.loads((given.out / "results.json").read_text(encoding="utf-8"))
    traces = Traces(
        load_token_trace(given.data / "gpt-oss-20b.npz", "this study"),
        load_token_trace(given.data / "deepseek-v2-lite.npz", "this study"),
        load_token_trace(OLMOE, "this study"),
    )
    found: dict[str, list[dict[str, str]]] = {}
    for section in SECTIONS:
        name = section.__name__
        if given.only and name not in given.only.split(","):
            found[name] = kept.get(name, [])
            continue
        found[name] = [asdict(row) for row in section(traces)]
        for row in found[name]:
            print(f"{row['system']}: {row['ours']} [{row['setting']}]", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    lines = [
        f"| {r['system']} | {r['claim']} ({r['source']}) | {r['ours']} | {r['setting']} |"
        f" {r['why']} |"
        for rows in found.values()
        for r in rows
    ]
    atomic_write(given.out / "README.md", HEAD + "\n".join(lines) + "\n" + TAIL)
    atomic_write(given.out / "results.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

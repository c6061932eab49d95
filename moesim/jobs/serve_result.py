"""What `serve` says of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesim.figures import LATENCIES, SERVICE_FIGURES, figure, text_table
from moesim.jobs.result import Result

if TYPE_CHECKING:
    import pandas as pd

    from moesim.draw import Picture

STATS = ("mean", "p50", "p90", "p99")
HIDDEN_AT_ZERO = ("preemptions", "shortened", "demoted")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ServeResult(Result):
    """record: the whole run, as `--json` prints it (see `moesim.serving.record`)."""

    record: Mapping[str, Any]

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know."""
        return tuple(self.record["notices"])

    @property
    def missed(self) -> bool:
        """Whether a promise for all requests was missed."""
        return self.record["slo"] is not None and bool(self.record["slo"]["missed"])

    def line(self) -> str:
        record, metrics, rate = self.record, self.record["metrics"], "output_tokens_per_s_per_gpu"
        times = ", ".join(
            f"{short.upper()} p99 {figure(f'{short}_p99').text(metrics[f'{short}_p99'])} ms"
            for short in ("ttft", "tpot")
        )
        return (
            f"{record['name']}, {record['counts']['finished']:,} requests served;"
            f" {times}, {figure(rate).text(metrics[rate])} output tokens/s per GPU"
        )

    def summary(self) -> str:
        record, lines = self.record, []
        if record["defaults"]:
            taken = "; ".join(f"{k}: {v}" for k, v in record["defaults"].items())
            lines.append(f"defaults taken: {taken}")
        counts, metrics, asked = record["counts"], record["metrics"], record["requests"]
        lines.append(
            f"{asked['num_requests']:,} requests of {asked['source']} over"
            f" {asked['span_s']:,.0f} s ({asked['rate_per_s']:.2f}/s), prompts of"
            f" {asked['prompt_tokens']['mean']:,.0f} and outputs of"
            f" {asked['output_tokens']['mean']:,.0f} tokens on average"
        )
        one = record["deployment"]
        lines.append(f"{record['name']}; KV cache of {one['kv_tokens_per_rank']:,} tokens per rank")
        lines += [line for line in record["predictions"] if line.startswith("rebalancing: ")]
        others = [f"{n:,} {name}" for name, n in counts.items() if n and name != "finished"]
        lines.append(", ".join([f"{counts['finished']:,} finished", *others]))
        lines += _window(record["window"])
        lines += [_latencies(metrics), *_levels(record["by_level"])]
        rows = []
        for name in SERVICE_FIGURES:
            value, known = metrics.get(name), figure(name)
            if value is None or (name in HIDDEN_AT_ZERO and value == 0):
                continue
            rows.append([known.heading, known.text(value)])
        lines.append(text_table(["", ""], rows).lstrip("\n"))
        if record["pools"] is not None:
            lines.append(_pools_line(record["pools"]))
        if record["slo"] is not None:
            lines += _slo_lines(record["slo"])
        lines.append(f"basis: {record['basis']} at the weakest part (--json lists every part)")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return dict(self.record)

    def to_frame(self) -> pd.DataFrame:
        """One row per figure: value in its base unit (seconds for times), and label."""
        import pandas as pd

        from moesim.figures import FIGURES

        rows = {
            name: {"value": value, "label": FIGURES[name].label if name in FIGURES else name}
            for name, value in self.record["metrics"].items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("figure")

    def picture(self) -> Picture:
        from moesim.draw.serving import serving_poster

        return serving_poster(self.record)


def _latencies(metrics: Mapping[str, float | None]) -> str:
    rows = [
        [label, *(figure(f"{name}_{stat}").text(metrics[f"{name}_{stat}"]) for stat in STATS)]
        for name, label in LATENCIES.items()
    ]
    return text_table(["ms", *STATS], rows)


def _window(window: Mapping[str, Any]) -> list[str]:
    if window["state"] == "short":
        return ["no steady state: no rates; latencies and means over time are of the whole run"]
    span = f"from {window['start_s']:,.0f} s to the last arrival at {window['end_s']:,.0f} s"
    state = "" if window["state"] == "steady" else ", not a steady state"
    return [f"latencies of requests that arrive, rates and means over time {span}{state}:"]


def _levels(levels: Sequence[Mapping[str, Any]]) -> list[str]:
    if not levels:
        return []
    head = ["priority", "requests", "finished", "degraded", "TTFT p50", "TTFT p99", "TPOT p50"]
    rows = [
        [
            *(f"{row[name]:,}" for name in ("priority", "requests", "finished", "degraded")),
            *(figure(name).text(row[name]) for name in ("ttft_p50", "ttft_p99", "tpot_p50")),
        ]
        for row in levels
    ]
    return [text_table(head, rows)]


def _pools_line(pools: Mapping[str, float]) -> str:
    each, shares = f"{pools['sequences_per_rank']:.1f} sequences per attention rank", []
    for name, gpus in (("attention", "attention_gpus"), ("experts", "expert_gpus")):
        shares.append(f"{pools[gpus]:g} GPUs of {name} compute {pools[f'{name}_busy']:.0%} of it")
    return (
        f"two pools, a decode step of {each}: {', '.join(shares)}; its layers take"
        f" {pools['step_s'] * 1e3:,.1f} ms with the exchange as flows over the network,"
        f" {pools['step_closed_form_s'] * 1e3:,.1f} by the closed form that is used"
    )


def _slo_lines(slo: Mapping[str, Any]) -> list[str]:
    good = slo["goodput"]
    rate = ""
    if good["requests_per_s"] is not None:
        each = f"{good['requests_per_s_per_gpu']:.3f} per GPU"
        rate = f"{good['requests_per_s']:.2f} requests/s, {each}, "
    lines = [f"goodput under {slo['text']}: {rate}{good['share']:.1%} of the requests"]
    for miss in slo["missed"]:
        value = miss["value_s"]
        reason = (
            "too many requests are not served" if value is None else f"it is {value * 1e3:,.1f} ms"
        )
        lines.append(f"missed: {miss['promise']}: {reason}")
    return lines

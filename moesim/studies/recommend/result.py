"""What `recommend` returns: answers side by side, as text, frame and picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import plain
from moesim.figures import count, figure, text_table
from moesim.files import atomic_directory
from moesim.jobs.result import Result

if TYPE_CHECKING:
    import pandas as pd

    from moesim.draw import Picture

LATENCIES = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99")
COLUMNS = ("GPUs", "$/h", "$/M out", "req/s", "tok/s/GPU")
ERRORS = {"median": "half of the measured TPOTs", "p90": "nine of ten"}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class RecommendResult(Result):
    """record: what was asked and `answers`, one per model, type of GPU and engine, as `--json`
    prints it. files: launch lines and settings of the first answer, by name."""

    record: Mapping[str, Any]
    files: Mapping[str, str]

    @property
    def kept(self) -> bool:
        """Whether some answer keeps the promises."""
        return any(answer["kept"] for answer in self.record["answers"])

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know."""
        return tuple(self.record["notices"])

    def line(self) -> str:
        return "; ".join(headline(self.record["asked"], one) for one in self.record["answers"])

    def summary(self) -> str:
        lines = []
        taken = "; ".join(f"{k}: {v}" for k, v in self.record["defaults"].items())
        if taken:
            lines.append(f"defaults taken: {taken}")
        lines.append(f"asked: {self.record['asked']['text']}")
        answers = self.record["answers"]
        if len(answers) > 1:
            lines += ["", _side_by_side(answers)]
        for one in answers:
            lines += ["", *_answer(self.record["asked"], one)]
        for one in self.record["refused"]:
            lines += ["", f"{one['model']} on {one['gpu']}, {one['engine']}: {one['cause']}"]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return dict(self.record)

    def save(self, path: str | Path) -> Path:
        """Write a folder: `recommendation.json`, and the files that start and test the first option
        of every answer that keeps the promises. Raises InputError where it exists already."""
        with atomic_directory(path) as folder:
            Result.save(self, folder / "recommendation.json")
            for name, text in self.files.items():
                target = folder / name
                target.parent.mkdir(exist_ok=True)
                target.write_text(text, encoding="utf-8")
                target.chmod(0o755 if name.endswith(".sh") else 0o644)
        return Path(path)

    def to_frame(self) -> pd.DataFrame:
        """One row per option of every answer; latencies in seconds."""
        import pandas as pd

        names = ("layout", "num_gpus", "requests_per_s", "output_tokens_per_s_per_gpu")
        money = ("usd_per_hour", "usd_per_million_output_tokens", "kept")
        rows = [
            {name: one[name] for name in ("model", "gpu", "engine")}
            | {name: option[name] for name in (*names, *money)}
            | {name: option["figures"].get(name) for name in LATENCIES}
            for one in self.record["answers"]
            for option in one["options"]
        ]
        return pd.DataFrame(rows)

    def picture(self) -> Picture:
        from moesim.draw.recommend import recommend_poster

        return recommend_poster(self.record)


def headline(asked: Mapping[str, Any], one: Mapping[str, Any]) -> str:
    """One answer in one line: "32 h200-sxm: 2 x 8 prefill ..., $122/h"."""
    best = one["options"][0]
    held: Counter[str] = Counter()
    for role in best["roles"].values():
        held[role["gpu"]] += role["engines"] * role["gpus"]
    gpus = " and ".join(f"{n} {gpu}" for gpu, n in held.items())
    said = f"{one['model']}: {gpus}: {best['layout']}"
    if not one["kept"]:
        missed = "is overloaded" if best["overloaded"] else f"misses {one['binds']['promise']}"
        return f"{said} comes nearest, but {missed}"
    if asked["maximize"]:
        said += f" serves {best['requests_per_s']:.3g} requests/s"
    return said + _money(best)


def _money(option: Mapping[str, Any]) -> str:
    if option["usd_per_hour"] is None:
        return ", price not known"
    text = f", ${option['usd_per_hour']:,.0f}/h"
    split = option["split_usd"]
    if split is not None:
        return (
            f"{text}, ${split['usd_per_million_input_tokens']:.2f} per million input and"
            f" ${split['usd_per_million_output_tokens']:.2f} per million output tokens"
        )
    return f"{text}, ${option['usd_per_million_output_tokens']:.2f} per million output tokens"


def _answer(asked: Mapping[str, Any], one: Mapping[str, Any]) -> list[str]:
    lines = [f"{headline(asked, one)} ({one['engine']})"]
    best = one["options"][0]
    for name, role in best["roles"].items():
        lines.append(
            f"  {name}: {role['engines']} x {role['gpus']} {role['gpu']}, tp {role['tp']}, dp"
            f" {role['dp']}, ep {role['ep']}"
            + (f", {role['pp']} pipeline stages" if role["pp"] > 1 else "")
            + f", experts by {role['moe_comm']},"
            f" {role['max_batch_tokens']:,} tokens and {role['max_sequences']:,} sequences per step"
            f" of a rank, experts {role['expert_dtype']}, KV {role['kv_dtype']}"
            + (", two-batch overlap" if role["two_batch_overlap"] != "off" else "")
            + (f", {role['redundant_experts']} redundant experts" * bool(role["redundant_experts"]))
        )
    if one["speculation"] is not None:
        lines.append(
            f"  speculation: {count(one['speculation']['drafts'], 'draft')} of the model's own"
            f" layers per step, each accepted with {one['speculation']['acceptance']:g} (given)"
        )
    lines.append(_table(one["options"]))
    lines += [*_binding(one), *_firm(one), *_also(asked, one)]
    lines.append(
        f"searched: {one['searched']['shapes']} shapes of engines, {one['searched']['families']}"
        f" kinds of layout, {one['searched']['simulated']} simulated; basis: {one['basis']} at the"
        " weakest part, prices "
        + (", ".join(sorted({p["kind"] for p in one["prices"].values()})) or "unknown")
    )
    return lines


def _side_by_side(answers: Sequence[Mapping[str, Any]]) -> str:
    """The first option of every answer."""
    head = ["model", "GPU", "engine", "layout", *COLUMNS]
    rows = []
    for one in answers:
        best = one["options"][0]
        rows.append([one["model"], one["gpu"], one["engine"], _marked(best), *_cells(best)])
    return text_table(head, rows, left=4)


def _marked(option: Mapping[str, Any]) -> str:
    """The layout, with a cross where it misses a promise."""
    return str(option["layout"]) + ("" if option["kept"] else " x")


def _cells(option: Mapping[str, Any]) -> list[str]:
    dollars = option["usd_per_hour"], option["usd_per_million_output_tokens"]
    return [
        f"{option['num_gpus']}",
        *("-" if d is None else f"{d:,.{i * 2}f}" for i, d in enumerate(dollars)),
        f"{option['requests_per_s']:.3g}",
        f"{option['output_tokens_per_s_per_gpu']:,.0f}",
    ]


def _table(options: Sequence[Mapping[str, Any]]) -> str:
    head = ["layout", *COLUMNS]
    head += [
        f"{latency.upper()} {stat}, ms"
        for latency, _, stat in (name.partition("_") for name in LATENCIES)
    ]
    rows = [
        [
            _marked(option),
            *_cells(option),
            *(figure(name).text(option["figures"].get(name)) for name in LATENCIES),
        ]
        for option in options
    ]
    return text_table(head, rows)


def _binding(one: Mapping[str, Any]) -> list[str]:
    binds = one["binds"]
    used = "without end" if binds["used"] is None else f"{binds['used']:.0%} of the limit"
    lines = [f"binds: {binds['what']} ({binds['promise']}: {used})"]
    fewer = one["fewer"]
    if fewer is not None:
        missed = [
            f"{name}: " + ("never served" if ratio is None else f"{ratio:.0%} of the limit")
            for name, ratio in fewer["promises"].items()
            if ratio is None or ratio >= 1
        ]
        if fewer["overloaded"] and not missed:
            missed = ["a steady state: requests pile up"]
        what = f"misses {'; '.join(missed)}" if missed else "keeps the promises too"
        lines.append(
            f"one engine fewer ({fewer['layout']}, {count(fewer['num_gpus'], 'GPU')}) {what}"
        )
    return lines


def _also(asked: Mapping[str, Any], one: Mapping[str, Any]) -> list[str]:
    """What else was searched: what it would be with it, how to ask for it, what it rests on."""
    if not one["also"]:
        return []
    nothing = "no fewer GPUs"
    if not one["kept"]:
        nothing = "misses the promises too"
    elif asked["maximize"]:
        nothing = "no more requests/s"
    elif "/" in one["gpu"]:
        nothing = "costs no less"
    lines = ["searched beside it, for you to choose:"]
    for other in one["also"]:
        option, ask = other["option"], f" ({other['ask']})" if other["ask"] else ""
        said = nothing
        if option is not None:
            rate = f", {option['requests_per_s']:.3g} requests/s" * bool(asked["maximize"])
            dollars = option["usd_per_hour"]
            money = "" if dollars is None else f", ${dollars:,.0f}/h"
            said = f"{count(option['num_gpus'], 'GPU')}{rate}{money}: {option['layout']};"
            said = f"{said} {other['rests_on']}"
        lines.append(f"  {other['name']}{ask}: {said}")
    return lines


def _firm(one: Mapping[str, Any]) -> list[str]:
    firm = one["firm"]
    if firm is None:
        return []
    if firm["held_out_tpot_error"] is None:
        return [
            f"how firm: no service was measured {firm['unlike']}, so the error of the prediction is"
            " not known"
        ]
    parts = []
    for name, row in firm["if_steps_differ_by"].items():
        low, most = row["faster_gpus"], row["slower_gpus"]
        span = f"{count(low, 'GPU')} to none of this kind"
        if most is not None:
            span = count(low, "GPU") if low == most else f"{low} to {most} GPUs"
        parts.append(f"{ERRORS[name]} were within {row['error']:.0%}: {span}")
    return [f"how firm ({plain(one['engine'])}, reports/serving-accuracy): {'; '.join(parts)}"]

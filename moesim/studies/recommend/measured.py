"""A benchmark of the deployment beside its prediction, and the engine's constants refitted to it.

`vllm bench serve --save-result` writes one JSON object, SGLang's benchmark one per line; both have
the same names for what is read here (vLLM 0.33.0, benchmarks/serve.py; SGLang 0.5.23,
benchmark/serving.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import FormatError, InputError
from moesim.figures import figure, text_table
from moesim.files import atomic_write
from moesim.jobs.result import Result
from moesim.serving.engines import EngineProfile, engine_profile
from moesim.studies.recommend.deployed import deployed
from moesim.studies.recommend.refit import refit, with_engine

if TYPE_CHECKING:
    import pandas as pd

    from moesim.draw import Picture

MAX_BYTES = 64 << 20
STATS = {"mean": "mean", "median": "p50", "p90": "p90", "p99": "p99"}
"""A statistic as the tools call it, and as moesim does."""
LOST = 0.01
"""Share of the requests that may have failed."""
SERVED = 0.8
"""Least share of the sent rate that a steady service serves; the rest is the run's end."""
BACKENDS = (("sglang", "sglang"), ("trt", "trtllm"), ("tensorrt", "trtllm"))
"""How the tools' `backend` begins, and the engine; others, vLLM's own among them, speak OpenAI's
protocol, which all have."""
REFITTED = ("eager_layer_us", "kernel_us", "request_ms")
MOST = 1e15
"""No figure of a benchmark is larger."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """rate: requests/s that were sent; prompt, output: mean tokens of the requests completed.
    figures: seconds by moesim's names. server: the engine, where the file says it, else ""."""

    rate: float
    completed: int
    prompt: float
    output: float
    figures: Mapping[str, float]
    server: str = ""


def read_benchmark(path: str | os.PathLike[str]) -> Benchmark:
    """The last result in a file of vLLM's or SGLang's benchmark. Raises FormatError where it is
    none, InputError for a run that is not of Poisson arrivals at one rate, or whose requests were
    not served, since a promise is about those."""
    where = Path(path).name
    raw = _last_object(Path(path), where)
    rate = _rate(raw, where)
    completed = _completed(raw, rate, where)
    figures = {
        f"{latency}_{ours}": _number(raw, f"{theirs}_{latency}_ms", where) / 1e3
        for latency in ("ttft", "tpot")
        for theirs, ours in STATS.items()
        if raw.get(f"{theirs}_{latency}_ms") is not None
    }
    if not {"ttft_p50", "tpot_p50"} <= set(figures) or min(figures.values()) <= 0:
        raise FormatError(f"{where}: no TTFT and TPOT above 0", "keep the tool's own file")
    return Benchmark(
        rate,
        int(completed),
        _number(raw, "total_input_tokens", where) / completed,
        _number(raw, "total_output_tokens", where) / completed,
        figures,
        next((name for key, name in BACKENDS if str(raw.get("backend")).startswith(key)), ""),
    )


def _rate(raw: Mapping[str, Any], where: str) -> float:
    remedy = "measure at a rate of Poisson arrivals: the bench.sh that recommend writes does"
    sent = raw["request_rate"]
    if sent == "trace":
        raise InputError(f"{where}: requests were sent as a trace says", remedy)
    rate = math.inf if sent == "inf" else _number(raw, "request_rate", where)
    if not math.isfinite(rate):
        raise InputError(f"{where}: all requests were sent at once, not at a rate", remedy)
    if raw.get("burstiness", 1.0) != 1.0:
        raise InputError(f"{where}: arrivals of burstiness {raw['burstiness']!r:.20}", remedy)
    if raw.get("ramp_up_strategy") is not None:
        raise InputError(f"{where}: the rate rose during the run", remedy)
    return rate


def _completed(raw: Mapping[str, Any], rate: float, where: str) -> float:
    """Requests that were completed, nearly all and about as quickly as they were sent."""
    completed = _number(raw, "completed", where)
    if completed < 1:
        raise FormatError(f"{where}: no request was completed", "see the server's log")
    failed = _number(raw, "failed", where) if "failed" in raw else 0.0
    planned = _number(raw, "num_prompts", where) if "num_prompts" in raw else 0.0
    sent = max(completed + failed, planned)
    if completed < (1 - LOST) * sent:
        raise InputError(
            f"{where}: {completed:,.0f} of {sent:,.0f} requests were completed",
            "see the server's log, and measure again",
        )
    served = _number(raw, "request_throughput", where) if "request_throughput" in raw else rate
    if served < SERVED * rate:
        capped = raw.get("max_concurrency")
        why = "overloaded" if capped is None else f"held to {capped!r:.20} requests at a time"
        raise InputError(
            f"{where}: {rate:g} requests/s were to be sent and {served:.3g} served: {why}, or too"
            " short a run",
            "measure at a rate that the service keeps up with, for minutes, without a cap",
        )
    return completed


def _last_object(path: Path, where: str) -> dict[str, Any]:
    remedy = "give what `vllm bench serve --save-result` or SGLang's --output-file wrote"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FormatError(f"{where}: more than {MAX_BYTES >> 20} MB", remedy)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {where}: {error}", remedy) from None
    for part in (text, *reversed(text.splitlines())):
        if not part.strip():
            continue
        try:
            found = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and "request_rate" in found:
            return found
    raise FormatError(f"{where}: no result of a serving benchmark", remedy)


def _number(raw: Mapping[str, Any], name: str, where: str) -> float:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MOST:
        raise FormatError(f"{where}: {name} is {value!r:.40}", "give the tool's own file")
    return float(value)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class MeasuredResult(Result):
    """Measured, predicted, and predicted with the refitted `engine`; seconds by name. unmet:
    medians that no value of the refitted constants gives."""

    measured: Benchmark
    predicted: Mapping[str, float | None]
    refitted: Mapping[str, float | None]
    engine: EngineProfile
    layout: str
    unmet: tuple[str, ...] = ()

    def line(self) -> str:
        return (
            f"{self.layout}: TPOT p50 {self._off('tpot_p50')}, TTFT p50 {self._off('ttft_p50')}"
            " against the measurement"
        )

    def _off(self, name: str) -> str:
        value = self.predicted[name]
        return "-" if value is None else f"{value / self.measured.figures[name] - 1:+.0%}"

    def summary(self) -> str:
        rows = []
        for name, value in self.measured.figures.items():
            shown = figure(name)
            rows.append(
                [
                    shown.heading,
                    shown.text(value),
                    shown.text(self.predicted[name]),
                    self._off(name),
                    shown.text(self.refitted[name]),
                ]
            )
        head = ["", "measured", "predicted", "off", "refitted"]
        return "\n".join(
            [
                f"{self.layout}: {self.measured.completed:,} requests at"
                f" {self.measured.rate:g}/s, prompts of {self.measured.prompt:,.0f} and outputs of"
                f" {self.measured.output:,.0f} tokens",
                text_table(head, rows),
                *self._said(),
            ]
        )

    def _said(self) -> list[str]:
        names = [n for n in REFITTED if n == "request_ms" or n in self.engine.source]
        values = ", ".join(f"{name} {getattr(self.engine, name):.1f}" for name in names)
        lines = [
            f"refitted to this run: {values} (it is no test of them: measure at another rate, and"
            " give the file with --engine)"
        ]
        lines += [
            f"not met: no value of these constants gives the measured {figure(name).label};"
            " what differs is something else, and the refitted file should not be used"
            for name in self.unmet
        ]
        return lines

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "moesim-measured",
            "version": 1,
            "layout": self.layout,
            "requests_per_s": self.measured.rate,
            "measured": dict(self.measured.figures),
            "predicted": {name: self.predicted[name] for name in self.measured.figures},
            "refitted": {name: self.refitted[name] for name in self.measured.figures},
            "unmet": list(self.unmet),
            "engine": self.engine.to_file(),
        }

    def to_frame(self) -> pd.DataFrame:
        import pandas as pd

        data = self.to_json()
        names = ("measured", "predicted", "refitted")
        return pd.DataFrame({name: data[name] for name in names}).rename_axis("figure")

    def picture(self) -> Picture:
        from moesim.draw.charts import Bar, bars

        rows = []
        for name, value in self.measured.figures.items():
            shown = figure(name)
            both = (("measured", 1, value), ("predicted", 0, self.predicted[name] or 0.0))
            rows += [
                Bar(f"{shown.label}, {what}", (("", series, v * shown.factor),), shown.text(v))
                for what, series, v in both
            ]
        return bars("Measured and predicted", rows, "ms")

    def save(self, path: str | Path) -> Path:
        """The refitted engine, a file that `engine` takes wherever an engine is named."""
        import yaml

        atomic_write(Path(path), yaml.safe_dump(self.engine.to_file(), sort_keys=False))
        return Path(path)


def compare_measured(
    answer: str | os.PathLike[str], measured: str | os.PathLike[str], engine: str | None = None
) -> MeasuredResult:
    """answer: the folder that `recommend` wrote, whose first option was deployed. measured: the
    benchmark's file. engine: constants to predict with instead of the answer's, as a run at another
    rate gave them.

    The constants are refitted to the medians (`refit`). Raises FormatError and InputError for files
    that are not such.
    """
    benchmark = read_benchmark(measured)
    bench, layout = deployed(Path(answer), benchmark.rate, benchmark.prompt, benchmark.output)
    if engine is not None:
        bench = with_engine(bench, engine_profile(engine))
    if benchmark.server and benchmark.server != bench.place.engine:
        raise InputError(
            f"{Path(measured).name} is of {benchmark.server}, the answer is of"
            f" {bench.place.engine}",
            "give the folder whose scripts were started",
        )
    first = bench.run(layout, benchmark.rate)
    found = refit(bench, layout, benchmark.rate, benchmark.figures, Path(measured).name)
    return MeasuredResult(
        benchmark, first.figures, found.tried.figures, found.engine, layout.name, found.unmet
    )

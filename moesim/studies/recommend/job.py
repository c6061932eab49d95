"""`recommend`: how many GPUs, how to split them, and what that costs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moesim.cluster import cluster_names, gpu_names, load_cluster
from moesim.cluster.prices import Prices, check_names, parse_prices
from moesim.errors import InfeasibleError, InputError, UnknownNameError
from moesim.jobs import inputs
from moesim.model.dtypes import KV_BYTES, WEIGHT_BYTES
from moesim.serving.engines import engine_profile
from moesim.serving.requests import Requests
from moesim.studies.recommend.answer import answer
from moesim.studies.recommend.files import launch_files
from moesim.studies.recommend.layouts import Bench
from moesim.studies.recommend.need import UNSAID, Need, need_of
from moesim.studies.recommend.others import mtp, others
from moesim.studies.recommend.result import RecommendResult
from moesim.studies.recommend.shapes import Place, sized
from moesim.types import Progress

if TYPE_CHECKING:
    from moesim.jobs.inputs import ModelLike, TraceLike
    from moesim.model.spec import ModelSpec

FORMAT, VERSION = "moesim-recommendation", 1
MAX_GPUS = 256
DEFAULT_GPU = "h200-sxm"
_SOURCE = re.compile(r"Hugging Face (\S+/\S+) config\.json")


def recommend(
    model: ModelLike | Sequence[ModelLike],
    *,
    gpu: str | Sequence[str] | None = None,
    cluster: str | Sequence[str] | None = None,
    engine: str | Sequence[str] = "vllm",
    rate: float | None = None,
    prompt: int | str | None = None,
    output: int | str | None = None,
    requests: str | os.PathLike[str] | Requests | None = None,
    slo: str | None = None,
    gpus: int | None = None,
    maximize: Literal["goodput"] | None = None,
    expert_dtype: str | None = None,
    kv_dtype: str = "bf16",
    memory_fraction: float | None = None,
    decode_gpu: str | None = None,
    speculate: float | None = None,
    drafts: int = 1,
    redundant_experts: bool = False,
    alternatives: bool = True,
    experts_apart: bool = False,
    trace: TraceLike | None = None,
    price: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> RecommendResult:
    """The fewest GPUs that serve `rate` requests/s within the promises, or with `maximize` the most
    requests/s that `gpus` GPUs serve within them, and how the GPUs are split.

    model, gpu, engine: one or several; an answer for each combination. gpu: a type, whose bundled
    cluster is taken; cluster: one by name or file instead. requests: a log, or `rate` with the
    lengths `prompt` and `output` (a number, or lognormal(1000;0.8) and the like). slo: promises,
    "ttft_p99<2s,tpot_p99<50ms"; one without a percentile holds for 99% of the requests. gpus: the
    most to use. trace: how uneven experts are, else assumed. Searched are tensor, data, expert and
    pipeline parallelism, numbers of engines, prompts and decoding together or apart, how tokens
    reach their experts, two-batch overlap, and tokens per step; with a trace or `redundant_experts`
    also a redundant expert per GPU. decode_gpu: decoding engines are on this type of GPU, and least
    dollars an hour are looked for. speculate: probability that a token drafted by the model's own
    layers is accepted, of `drafts` in every step. alternatives: search too, and say beside the
    answer, what would need fewer GPUs in another precision, with speculation, with redundant
    experts or, on request, with `experts_apart`; none is chosen. docs/recommend.md says what is not
    searched. progress(done, total) counts kinds of layout.

    Raises InputError and UnknownNameError for what is not clear, InfeasibleError where no
    combination has an answer.
    """
    _check(rate, requests, gpus, maximize)
    _check_engine(expert_dtype, kv_dtype, memory_fraction)
    need = need_of(slo, rate, prompt, output, requests, seed)
    defaults = _defaults(slo, prompt, output, requests, gpus, gpu, cluster)
    if decode_gpu is not None:
        defaults["cluster of decoding"] = _cluster_with(decode_gpu)
    if speculate is not None and drafts == 1:
        defaults["drafts"] = "1 per step"
    prices = parse_prices(list(price))
    options = {
        "expert_dtype": expert_dtype,
        "kv_dtype": kv_dtype,
        "memory_fraction": memory_fraction,
        "trace": None if trace is None else inputs.token_trace_of(trace, "recommend"),
    }
    asked = Asked(
        need,
        Prices(prices),
        MAX_GPUS if gpus is None else gpus,
        maximize is not None,
        alternatives,
        experts_apart,
        None if trace is None else _source_of(trace),
    )
    decode = "" if decode_gpu is None else _cluster_with(decode_gpu)
    places = []
    for one, where, name in product(_list(model), _clusters(gpu, cluster), _list(engine)):
        place = Place(
            inputs.model_of(one),
            where,
            engine_profile(str(name)),
            options,
            decode_cluster="" if decode == where else decode,
            redundancy=redundant_experts or trace is not None,
        )
        if speculate is not None:
            place = replace(place, speculation=mtp(place, speculate, drafts))
        places.append((one, str(name), place))
    used = {name for _, _, place in places for name in place.clusters}
    check_names(prices, {gpu.name for name in used for gpu in sized(name, 1).gpus})
    found = _answers(asked, places, progress)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "model": ", ".join(dict.fromkeys(place.model.name for _, _, place in places)),
        "asked": _asked(need, gpus, maximize),
        "defaults": defaults,
        "notices": list(found.notices),
        "answers": found.answers,
        "refused": found.refused,
    }
    return RecommendResult(record, found.files)


@dataclass(frozen=True, slots=True)
class Asked:
    """What every combination is asked."""

    need: Need
    prices: Prices
    gpus: int
    maximize: bool
    alternatives: bool
    experts_apart: bool
    trace_source: str | None = None


@dataclass(slots=True)
class Answers:
    """Of all combinations; `files` by name."""

    notices: dict[str, None]
    answers: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


def _check(
    rate: float | None,
    requests: Any,
    gpus: int | None,
    maximize: str | None,
) -> None:
    if maximize not in (None, "goodput"):
        raise InputError(f"`maximize` {maximize}", "give goodput, or leave it out")
    if maximize is not None and gpus is None:
        raise InputError("`maximize` without `gpus`: goodput of how many?", "give `gpus`")
    if maximize is None and rate is None and requests is None:
        raise InputError(
            "neither a rate nor a log of requests is given",
            "give `rate`, `requests`, or `gpus` with `maximize`",
        )


def _check_engine(expert_dtype: str | None, kv_dtype: str, memory_fraction: float | None) -> None:
    if memory_fraction is not None and not 0 < memory_fraction <= 1:
        raise InputError(f"`memory_fraction` {memory_fraction}", "give a share above 0, at most 1")
    for name, value, known in (
        ("expert_dtype", expert_dtype, WEIGHT_BYTES),
        ("kv_dtype", kv_dtype, KV_BYTES),
    ):
        if value is not None and value not in known:
            raise UnknownNameError(name, value, known)


def _answers(
    asked: Asked, places: Sequence[tuple[ModelLike, str, Place]], progress: Progress | None
) -> Answers:
    """An answer for each place, or why it has none. Raises InfeasibleError where none has."""
    need = asked.need
    out = Answers(dict.fromkeys(need.log.notices if need.log is not None else ()))
    for i, (given, name, place) in enumerate(places):
        try:
            found = answer(
                Bench(place, need, asked.prices),
                asked.gpus,
                named={
                    "model_source": given if isinstance(given, str) else place.model.name,
                    "engine_source": name,
                    "trace_source": asked.trace_source,
                },
                maximize=asked.maximize,
                also=tuple(others(place, asked.experts_apart)) if asked.alternatives else (),
                progress=_part(progress, i, len(places)),
            )
        except InfeasibleError as error:
            if len(places) == 1:
                raise
            out.refused.append(_refusal(place, error))
            continue
        out.answers.append(found)
        if found["kept"]:
            named = inputs.model_served(given) or _repository(place.model)
            written, said = launch_files(found, need, named, place)
            out.notices |= dict.fromkeys(said)
            folder = f"{_folder(place)}/" if len(places) > 1 else ""
            out.files |= {folder + name: text for name, text in written.items()}
    if not out.answers:
        raise InfeasibleError(
            "; ".join(one["cause"] for one in out.refused), "promise less, or allow more GPUs"
        )
    return out


def _source_of(trace: TraceLike) -> str:
    """Name or absolute path of a trace; "" for one that has none."""
    if not isinstance(trace, (str, os.PathLike)):
        return ""
    path = Path(trace)
    return str(path.resolve()) if path.exists() else str(trace)


def _repository(model: ModelSpec) -> str:
    """What engines call a preset: the repository that its sizes are from; else its name."""
    found = _SOURCE.match(model.source)
    return model.name if found is None else found[1]


def _folder(place: Place) -> str:
    """What the files of one of several answers are called."""
    text = f"{place.model.name}-{Path(place.cluster).stem}-{place.engine}"
    return "".join(ch if ch.isalnum() or ch in "-._" else "-" for ch in text)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _clusters(gpu: Any, cluster: Any) -> list[str]:
    """Names of the clusters; of a type of GPU the first bundled one with nothing else in it."""
    if cluster is not None:
        if gpu is not None:
            raise InputError("`gpu` and `cluster` both name the hardware", "leave one of them out")
        return [_of_one_type(str(one)) for one in _list(cluster)]
    return [_cluster_with(str(one)) for one in _list(DEFAULT_GPU if gpu is None else gpu)]


def _of_one_type(cluster: str) -> str:
    types = {one.name for one in load_cluster(cluster).gpus}
    if len(types) > 1:
        raise InputError(
            f"{cluster} mixes {' and '.join(sorted(types))}: which are the engines on?",
            "name the types with `gpu` and `decode_gpu`",
        )
    return cluster


def _cluster_with(gpu: str) -> str:
    if gpu not in gpu_names():
        raise UnknownNameError("GPU", gpu, gpu_names())
    for name in cluster_names():
        if {one.name for one in load_cluster(name).gpus} == {gpu}:
            return name
    raise InputError(
        f"no bundled cluster is made of {gpu}",
        "describe one in a YAML file (docs/topologies.md) and give it as `cluster`",
    )


def _defaults(
    slo: str | None,
    prompt: int | str | None,
    output: int | str | None,
    requests: Any,
    gpus: int | None,
    gpu: Any,
    cluster: Any,
) -> dict[str, str]:
    out = {}
    if gpu is None and cluster is None:
        out["GPU"] = DEFAULT_GPU
    if cluster is None:
        out["cluster"] = ", ".join(_clusters(gpu, None))
    if requests is None and prompt is None:
        out["prompt"] = "1000 tokens"
    if requests is None and output is None:
        out["output"] = "300 tokens"
    if gpus is None:
        out["most GPUs"] = str(MAX_GPUS)
    if slo is not None and not all("_" in part for part in slo.split(",")):
        out["promises without a percentile"] = UNSAID
    return out


def _asked(need: Need, gpus: int | None, maximize: str | None) -> dict[str, Any]:
    load = need.requests(need.rate)
    goal = f"the most requests/s on {gpus} GPUs" if maximize else f"{need.rate:g} requests/s"
    source = "a log" if need.log is not None else "drawn, Poisson arrivals"
    text = (
        f"{goal}, prompts of {need.prompt:,.0f} and outputs of {need.output:,.0f} tokens on"
        f" average ({source}), {need.slo}"
    )
    return {
        "text": text,
        "rate": need.rate,
        "prompt_tokens": need.prompt,
        "output_tokens": need.output,
        "slo": str(need.slo),
        "promises": [
            {"figure": b.name, "limit_s": b.limit_s, "text": str(b)} for b in need.slo.bounds
        ],
        "gpus": gpus,
        "maximize": maximize,
        "requests": load.describe(),
        "seed": need.seed,
    }


def _refusal(place: Place, error: InfeasibleError) -> dict[str, str]:
    return {
        "model": place.model.name,
        "gpu": place.cluster,
        "engine": place.engine,
        "cause": error.cause,
    }


def _part(progress: Progress | None, i: int, parts: int) -> Progress | None:
    """Progress over all answers of what one counts."""
    if progress is None:
        return None
    return lambda done, total: progress(i * total + done, parts * total)

"""What `moesim simulate --requests` reads, and the defaults it takes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.serving.config import Level
    from moesim.serving.deployment import Deployment
    from moesim.serving.requests import Requests
    from moesim.serving.routing import DomainRouting

DEFAULT_GPUS = 8
_LEVEL = re.compile(r"^(queue|refuse|shorten|demote)(?:@(\d{1,9}))?(?:=([0-9.]+))?$")


@dataclass(frozen=True, slots=True)
class Parallelism:
    """GPUs and how they are divided, as given; None for the default."""

    gpus: int | None
    replicas: int
    tp: int | None
    dp: int | None
    ep: int | None
    decode_gpus: int | None
    decode_replicas: int


def read_requests(
    text: str,
    first: int | None,
    skip_empty: bool,
    rate_scale: float,
    priorities: str | None,
    seed: int,
    time_unit: str | None = None,
    block_tokens: int | None = None,
) -> Requests:
    """Requests of a file or process, cut, sped up, and with priorities drawn."""
    from moesim.serving.arrivals import load_requests
    from moesim.serving.synthetic import is_synthetic, synthetic_requests

    if is_synthetic(text):
        if time_unit is not None or block_tokens is not None:
            raise InputError(
                "--time-unit and --block-tokens are for request logs, not for drawn requests",
                "leave them out",
            )
        out = synthetic_requests(text, seed)
    else:
        out = load_requests(
            text, skip_empty=skip_empty, time_unit=time_unit, block_tokens=block_tokens
        )
    if first is not None:
        out = out.first(first)
    if rate_scale != 1.0:
        out = out.scaled(rate_scale)
    if priorities is not None:
        out = out.with_priorities(_numbers(priorities, "--priorities"), seed)
    return out


def load_service(
    model: str | None,
    cluster: str | None,
    plan: Path | None,
    trace: str | None,
    par: Parallelism,
    options: dict[str, Any],
    defaults: dict[str, str],
) -> tuple[Deployment, Deployment | None]:
    """One replica of the front (or only) engines, and of the decoding ones.

    Raises InputError where the GPUs do not divide, or nothing names the model.
    """
    from moesim.cluster import DEFAULT_CLUSTER
    from moesim.model.names import load_model
    from moesim.placement import load_plan
    from moesim.trace.format import load_token_trace

    made = load_plan(plan) if plan is not None else None
    routed = load_token_trace(trace, "moesim simulate") if trace is not None else None
    name = model or (made.model if made is not None else None)
    name = name or (routed.meta.model if routed is not None else None)
    if not name:
        raise InputError(
            "nothing says which model is served", "name one with --model (a preset or config.json)"
        )
    spec = load_model(str(name))
    if cluster is None:
        cluster = DEFAULT_CLUSTER
        defaults["cluster"] = cluster
    gpus = par.gpus
    if gpus is None:
        gpus = DEFAULT_GPUS if made is None else made.placement.num_gpus * par.replicas
        defaults["GPUs"] = str(gpus)
    back = par.decode_gpus
    if back is not None and back >= gpus:
        raise InputError(
            f"{back} of {gpus} GPUs are to decode: none is left for prompts",
            "give fewer --decode-gpus, or more --gpus",
        )
    options = options | {"plan": made, "trace": routed}
    front = gpus - (back or 0)
    one = _replica(spec, cluster, _share(front, par.replicas, "replicas"), par, options)
    defaults["deployment"] = one.name
    two = None
    if back is not None:
        each = _share(back, par.decode_replicas, "decode replicas")
        if made is not None and each != one.num_gpus:
            raise InputError(
                f"the plan is for {made.placement.num_gpus} GPUs, a decoding engine has {each}",
                "give prompts and decoding engines of the plan's size, or no plan",
            )
        two = _replica(spec, cluster, each, par, options)
        defaults["decoding engines"] = two.name
    return one, two


def _share(gpus: int, parts: int, what: str) -> int:
    if gpus % parts or gpus < parts:
        raise InputError(
            f"{gpus} GPUs do not divide among {parts} {what}", "choose a multiple of them"
        )
    return gpus // parts


def _replica(
    spec: Any, cluster: str, gpus: int, par: Parallelism, options: dict[str, Any]
) -> Deployment:
    from moesim.serving.deployment import deploy
    from moesim.serving.fit import fitting_deployment

    if par.tp is None and par.dp is None and par.ep is None:
        return fitting_deployment(spec, cluster, gpus, **options)
    tp, dp = par.tp, par.dp
    if dp is None:
        dp = _share(gpus, tp, "tensor-parallel ranks") if tp is not None else 1
    if tp is None:
        tp = _share(gpus, dp, "data-parallel ranks")
    return deploy(spec, cluster, tp=tp, dp=dp, ep=par.ep, num_gpus=gpus, **options)


def level_rules(texts: list[str]) -> tuple[Level, ...]:
    """Levels from texts such as "queue", "refuse@8" and "shorten@8=0.5"."""
    from moesim.serving.config import Level

    out = []
    for text in texts:
        found = _LEVEL.match(text)
        if found is None or (found[3] is not None and found[1] != "shorten"):
            raise InputError(
                f"--level {text!r:.60}", "write queue, refuse@8, shorten@8=0.5 or demote@8"
            )
        share = _numbers(found[3], "--level")[0] if found[3] is not None else 0.5
        out.append(Level(found[1], int(found[2] or 0), share))  # type: ignore[arg-type]
    return tuple(out)


def routing_of(
    deployment: Deployment, mix: str | None, drift_hours: float | None, seed: int
) -> DomainRouting | None:
    """The domains of the deployment's trace. Raises InputError for a mix without a trace."""
    from moesim.serving.routing import DomainRouting

    if deployment.trace is None:
        if mix is not None or drift_hours is not None:
            raise InputError(
                "a domain mix or drift without a routing trace", "name one with --trace"
            )
        return None
    weights = None
    if mix is not None:
        weights = {}
        for part in mix.split(","):
            name, sign, value = part.rpartition("=")
            if not sign:
                raise InputError(f"{part!r:.60} in --domain-mix", "write NAME=WEIGHT,NAME=WEIGHT")
            weights[name.strip()] = _numbers(value, "--domain-mix")[0]
    hours = float("inf") if drift_hours is None else drift_hours
    return DomainRouting(deployment.trace, weights, hours * 3600.0, seed)


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text!r:.60} holds no number", "give numbers") from None

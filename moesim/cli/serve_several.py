"""`moesim serve` with `--pool` or `--whole-models`: several models behind one router."""

from __future__ import annotations

import json

import typer

from moesim.cli.output import echo
from moesim.errors import InputError

LOGGED = ("skip_empty", "time_unit", "block_tokens", "first", "rate_scale")
POOLED = (
    *LOGGED, "cluster", "engine", "replicas", "tp", "dp", "ep", "expert_dtype", "kv_dtype",
    "max_batch_tokens", "max_sequences", "memory_fraction", "block_size", "prefix_cache", "prefill",
    "chunk_tokens", "router", "speculate", "drafts", "slo", "until",
)  # fmt: skip
"""Options of a log, and those that all pools take."""


def several(context: typer.Context, as_json: bool) -> None:
    """Pools of models, or whole models in three tiers: with the options that were given."""
    from moesim.cli.output import notice
    from moesim.jobs.serve_composition import CompositionResult, serve_composition
    from moesim.jobs.serve_pools import PoolsResult, serve_pools

    own = [n for n in context.params if _was_given(context, n)]
    asked = {n: context.params[n] for n in own if n != "as_json"}
    result: PoolsResult | CompositionResult
    if asked.get("pool"):
        allowed = {"requests", "pool", "by", "seed", *POOLED}
        _only(asked, allowed, "pool")
        pools = asked.pop("pool")
        result = serve_pools(asked.pop("requests"), pools, **asked)
        notice(*result.notices)
    else:
        allowed = {"requests", "whole_models", "skew", "by", "model", "cluster", "gpus", "engine"}
        _only(asked, allowed | {"seed", *LOGGED}, "whole_models")
        if "model" not in asked:
            raise InputError("`whole_models` without `model`", "say of which model's size they are")
        result = serve_composition(asked.pop("requests"), **asked)
    echo(json.dumps(result.to_json(), indent=1) if as_json else result.summary())
    if isinstance(result, PoolsResult) and result.missed:
        raise typer.Exit(1)


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _only(asked: dict[str, object], allowed: set[str], what: str) -> None:
    for name in asked:
        if name not in allowed:
            raise InputError(f"`{name}` with `{what}`, which does not take it", "leave it out")

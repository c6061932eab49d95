"""What jobs are given: names, paths or objects, and the defaults where nothing was given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.cluster import DEFAULT_CLUSTER, Cluster, Machine, load_cluster, load_machine
from moesim.cluster.load import cluster_of_machine, means_machine
from moesim.errors import InputError, MismatchError, UnknownNameError, plain
from moesim.model.names import load_model, preset_aliases
from moesim.model.spec import ModelSpec
from moesim.placement import Plan, load_plan
from moesim.trace.format import LoadTrace, Trace, load_trace, require_tokens
from moesim.trace.pools import own_experts

if TYPE_CHECKING:
    TraceLike = Trace | LoadTrace | str | os.PathLike[str]
    ModelLike = ModelSpec | str | os.PathLike[str]
    ClusterLike = Cluster | Machine | str | os.PathLike[str]
    MachineLike = Machine | str | os.PathLike[str]
    PlanLike = Plan | str | os.PathLike[str]


def trace_of(
    trace: TraceLike, needed_by: str = "this command", *, pools: bool = False
) -> Trace | LoadTrace:
    """A trace, or the one in a file, a directory or `sample:NAME`. pools: its layers may share
    experts. Raises MismatchError that names what knows no such."""
    found = trace if isinstance(trace, Trace | LoadTrace) else load_trace(str(trace))
    if not pools:
        own_experts(found, needed_by)
    return found


def token_trace_of(trace: TraceLike, needed_by: str, *, pools: bool = False) -> Trace:
    """The same with tokens. Raises MismatchError that names what needs them."""
    return require_tokens(trace_of(trace, needed_by, pools=pools), needed_by)


def rerouted(
    trace: Trace | LoadTrace, rule: str | None, *, batch_tokens: int | None = None, seed: int = 0
) -> tuple[Trace | LoadTrace, str | None]:
    """The trace as it is, or with the choices of a rule of routing and a line on what changed.

    batch_tokens: of both phases' batches, for rules that look at load; None for their defaults.
    Raises MismatchError for what the rule needs and a trace lacks.
    """
    if rule is None:
        return trace, None
    from moesim.routing.api import reroute
    from moesim.routing.partition import DECODE_TOKENS, PREFILL_TOKENS
    from moesim.routing.spec import rule_text

    whole = require_tokens(trace, "`reroute`")
    try:
        done = reroute(
            whole,
            rule,
            prefill_tokens=batch_tokens or PREFILL_TOKENS,
            decode_tokens=batch_tokens or DECODE_TOKENS,
            seed=seed,
        )
    except MismatchError as error:
        if "plan" not in error.cause:
            raise
        raise MismatchError(
            error.cause, "write the trace with moesim trace reroute --plan first"
        ) from None
    return done.trace, f"rerouted: {done.changes.line(rule_text(done.rule))}"


def model_of(model: ModelLike) -> ModelSpec:
    """A model, or that of a preset or a Hugging Face config.json."""
    return model if isinstance(model, ModelSpec) else load_model(str(model))


def model_or_named(model: ModelLike | None, named: str) -> ModelSpec | None:
    """The model given, else the preset that a trace or plan names, None where it names none: a
    name out of a file never leads to another file."""
    if model is not None:
        return model_of(model)
    try:
        preset_aliases(named)
    except UnknownNameError:
        return None
    return load_model(named)


def model_id(model: ModelLike | None) -> str:
    """The repository id, where one was given, as engines take it; "" for other names, paths and
    specs."""
    text = model if isinstance(model, str) else ""
    return text if "/" in text and not Path(text).exists() else ""


def model_served(model: ModelLike | None) -> str:
    """What an engine is told to serve: the repository id; of a path that exists, the absolute path
    of the folder; "" for other names and specs."""
    if isinstance(model, str) and Path(model).exists():
        path = Path(model).resolve()
        return str(path if path.is_dir() else path.parent)
    return model_id(model)


def model_required(model: ModelLike | None, named: str, source: str = "the trace") -> ModelSpec:
    """The same, where sizes are needed. Raises InputError."""
    found = model_or_named(model, named)
    if found is None:
        said = f"{source} is of {plain(named)}" if named else f"{source} names no model"
        raise InputError(
            f"{said}, whose sizes are not known" if named else f"{said}, so sizes are not known",
            "name a preset or a Hugging Face config.json with `model`",
        )
    return found


def cluster_of(
    cluster: ClusterLike | None,
    gpus: int | None,
    defaults: dict[str, str] | None = None,
    after: int = 0,
) -> Cluster:
    """A cluster of `gpus` GPUs, or a machine as one; its own size where that is None. The default
    is said in `defaults`. after: as in `load_cluster`."""
    if isinstance(cluster, Cluster):
        if gpus is None or cluster.num_gpus == gpus:
            return cluster
        raise InputError(
            f"the cluster has {cluster.num_gpus} GPUs, {gpus} are asked for",
            "give load_cluster(name, num_gpus=...) that many, or leave out `gpus`",
        )
    if isinstance(cluster, Machine):
        return cluster_of_machine(cluster, gpus)
    if cluster is None and defaults is not None:
        defaults["cluster"] = DEFAULT_CLUSTER
    return load_cluster(str(cluster or DEFAULT_CLUSTER), num_gpus=gpus, after=after)


def machine_in(cluster: ClusterLike | None) -> Machine | None:
    """The machine that stands for a cluster; None where it is none."""
    if isinstance(cluster, Machine):
        return cluster
    if cluster is None or isinstance(cluster, Cluster) or not means_machine(cluster):
        return None
    return load_machine(cluster)


def machine_of(machine: MachineLike) -> Machine:
    """A machine, or that of a name or YAML file."""
    return machine if isinstance(machine, Machine) else load_machine(machine)


def plan_of(plan: PlanLike, *, apart: bool = False) -> Plan:
    """A plan, or the one in a file. Raises InputError for one whose experts are on GPUs of their
    own unless the caller knows what that means (`apart`)."""
    made = plan if isinstance(plan, Plan) else load_plan(Path(plan))
    return made if apart else made.together()

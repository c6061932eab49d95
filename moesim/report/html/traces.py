"""Finding the trace that a plan was made from: the one that is given, or the one that the plan's
provenance names, if its hash is the plan's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moesim.errors import MoesimError
from moesim.placement import Plan
from moesim.planning.maps import PlanMaps, plan_maps
from moesim.trace.format import Trace, load_token_trace, sample_names

if TYPE_CHECKING:
    from moesim.cluster import Cluster
    from moesim.model.spec import ModelSpec

NEEDED_BY = "moesim report"


def maps_of(plan: Plan, given: Trace | None) -> PlanMaps | str:
    """The plan's maps, or the reason why there are none. Errors of a trace that was `given` are
    raised, those of one that was only looked for are the reason."""
    if given is not None:
        return plan_maps(given, plan, *_hardware(plan))
    found, reason = find_trace(plan)
    if found is None:
        return reason
    try:
        return plan_maps(found, plan, *_hardware(plan))
    except MoesimError as error:
        return error.cause


def find_trace(plan: Plan) -> tuple[Trace | None, str]:
    """The trace named in the command that made the plan; None and the reason if it is not there or
    not the same any more."""
    named = _named(plan)
    if named is None:
        return None, "the plan does not say which trace it was made from; give it with --trace"
    sample = named.removeprefix("sample:")
    known = sample in sample_names() if named.startswith("sample:") else Path(named).exists()
    if not known:
        return None, f"the plan's trace, {named}, is not here; give it with --trace"
    try:
        trace = load_token_trace(named, NEEDED_BY)
    except MoesimError as error:
        return None, error.cause
    whole = trace.content_hash() == plan.provenance.get("trace")
    domain = (plan.provenance.get("options") or {}).get("domain")
    if not whole and domain is None:
        return None, f"{named} has changed since the plan was made; give the plan's with --trace"
    return trace, ""


def _named(plan: Plan) -> str | None:
    run = plan.provenance.get("run")
    words = str(run.get("command", "")).split() if isinstance(run, dict) else []
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word == "--trace" and following:
            return following
        if word.startswith("--trace="):
            return word.removeprefix("--trace=")
    return None


def _hardware(plan: Plan) -> tuple[Cluster | None, ModelSpec | None]:
    """The plan's cluster and model where moesim knows them by name, and the cluster is the same."""
    from moesim.cluster import cluster_names, load_cluster
    from moesim.model.names import load_model, preset_aliases

    cluster, model = None, None
    name = plan.provenance.get("cluster")
    try:
        if name in cluster_names():
            cluster = load_cluster(
                str(name), num_gpus=plan.placement.num_gpus + plan.attention_gpus
            )
            if cluster.cluster_hash() != plan.provenance.get("cluster_hash"):
                cluster = None
        wanted = plan.provenance.get("model")
        if isinstance(wanted, str):
            preset_aliases(wanted)
            model = load_model(wanted)
    except MoesimError:
        pass
    return cluster, model

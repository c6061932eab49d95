"""moesim plans, simulates and validates the deployment of Mixture-of-Experts models.

The names below are the front door; nothing is imported until one of them is used. Their keyword
arguments have the names and defaults of the command line's options; traces, models, clusters and
plans are given as objects, paths or names.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesim.cluster import load_cluster as load_cluster
    from moesim.jobs.balance import balance as balance
    from moesim.jobs.cache import cache as cache
    from moesim.jobs.export import export as export
    from moesim.jobs.export import import_plan as import_plan
    from moesim.jobs.plan import plan as plan
    from moesim.jobs.reroute import reroute as reroute
    from moesim.jobs.serve import serve as serve
    from moesim.jobs.simulate import simulate as simulate
    from moesim.jobs.validate import validate as validate
    from moesim.model.names import load_model as load_model
    from moesim.placement import load_plan as load_plan
    from moesim.studies.elastic import elastic as elastic
    from moesim.studies.job import study as study
    from moesim.studies.recommend.job import recommend as recommend
    from moesim.trace.format import load_trace as load_trace

    __version__: str

_WHERE = {
    "plan": "moesim.jobs.plan",
    "simulate": "moesim.jobs.simulate",
    "serve": "moesim.jobs.serve",
    "recommend": "moesim.studies.recommend.job",
    "study": "moesim.studies.job",
    "balance": "moesim.jobs.balance",
    "elastic": "moesim.studies.elastic",
    "cache": "moesim.jobs.cache",
    "export": "moesim.jobs.export",
    "import_plan": "moesim.jobs.export",
    "validate": "moesim.jobs.validate",
    "reroute": "moesim.jobs.reroute",
    "load_trace": "moesim.trace.format",
    "load_model": "moesim.model.names",
    "load_cluster": "moesim.cluster",
    "load_plan": "moesim.placement",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("moesim")
    if name not in _WHERE:
        raise AttributeError(f"module 'moesim' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_WHERE[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

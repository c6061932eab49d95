"""The predictors by name."""

from __future__ import annotations

from moesim.caching.predictors.base import Predictor
from moesim.caching.predictors.history import History
from moesim.caching.predictors.learned import Learned
from moesim.caching.predictors.neural import Neural
from moesim.caching.predictors.oracle import Oracle
from moesim.caching.predictors.popularity import Popularity
from moesim.caching.predictors.previous_layer import PreviousLayer
from moesim.caching.predictors.token_id import TokenId
from moesim.errors import UnknownNameError
from moesim.trace.format import Trace

PREDICTORS = {
    cls.name: cls for cls in (Popularity, PreviousLayer, TokenId, History, Learned, Neural, Oracle)
}


def make_predictor(name: str, depth: int) -> Predictor:
    """A predictor, not fitted yet. Raises UnknownNameError."""
    if name not in PREDICTORS:
        raise UnknownNameError("predictor", name, PREDICTORS)
    return PREDICTORS[name](depth)


def usable_predictors(trace: Trace) -> tuple[str, ...]:
    """The predictors that a server could run, that this trace has the data for, and that are fitted
    in seconds: what `auto` tries."""
    return tuple(
        name
        for name in PREDICTORS
        if name not in ("oracle", "neural") and (name != "token-id" or trace.token_ids is not None)
    )

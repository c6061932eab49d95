"""What holds of every rule: INV-11, INV-6, and a trace that can be saved and read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from routing_traces import in_order, random_scores, scored_trace

from moesim.errors import MismatchError
from moesim.routing.api import reroute
from moesim.routing.base import REMEDIES
from moesim.routing.spec import OWN, parse_rule
from moesim.trace.format import Trace, load_token_trace, load_trace, save_trace
from moesim.trace.ops import SliceSpec, slice_trace

SPECS = (
    "drop:factor=0.7", "drop:factor=1,keep=first", "drop:factor=1,keep=last",
    "drop:factor=1,keep=random", "drop:factor=1,keep=position", "expanded-drop:factor=1",
    "expanded-drop:factor=0.5,by=room,reach=all", "expanded-drop:factor=1,reach=node",
    "fill-in:factor=1", "fill-in:factor=0.6,parts=intra", "fill-in:factor=1.5,parts=fill,extra=2",
    "base:group=16", "expert-choice", "bias:rate=0.01", "bias:rate=0.5,update=dual", "local",
    "local:weight=2,reach=node", "group-limit:groups=4,keep=2", "group-limit:groups=2,by=two",
    "random", "k:k=1", "k:k=3", "k:k=1,layers=0", "top-p:p=0.6", "top-p:p=0.9,most=2",
    "threshold:share=0.7", "null:mean=1.5", "null:mean=1,most=3", "prune-tokens",
    "prune-tokens:quantile=0.9,protect=2", "prune:keep=5", "prune:keep=4,by=gates,domain=b",
    "merge:keep=3", "freeze", "freeze:by=last", "steer:toward=a,experts=2", "skip-layer",
    "skip-layer:keep=0.3,layers=0,by=random",
)  # fmt: skip


def made(seed: int, listed: int, missing: float) -> Trace:
    """48 tokens of 6 requests, prompts and answers, in two domains; 8 experts, top-2."""
    rng = np.random.default_rng(seed)
    trace = scored_trace(
        random_scores(rng, 48, 2, 8),
        2,
        listed=listed,
        request_ids=np.repeat(np.arange(6), 8),
        phases=np.tile([0, 0, 0, 0, 0, 1, 1, 1], 6),
        domain_ids=np.repeat([0, 1, 0, 1, 0, 1], 8),
        domains=("a", "b"),
    )
    ids = np.asarray(trace.expert_ids).astype(np.int16)
    ids[rng.random(ids.shape) < missing] = -1
    gates = np.where(ids >= 0, np.asarray(trace.gate_weights), 0)
    fields: dict[str, Any] = {"expert_ids": ids, "gate_weights": gates.astype(np.float32)}
    return Trace(**{**trace.arrays(), **fields}, meta=trace.meta)


def test_every_rule_is_tried_below() -> None:
    assert {spec.partition(":")[0] for spec in SPECS} == set(OWN)


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=12)
@given(st.integers(0, 2**20), st.integers(3, 8), st.sampled_from([0.0, 0.3]))
def test_inv_11(spec: str, seed: int, listed: int, missing: float) -> None:
    """Tokens, order and layers stay; kept, moved, dropped and added add up; shares are shares; the
    same seed gives the same bytes (INV-6)."""
    trace = made(seed, listed, missing)
    done = reroute(trace, spec, in_order(trace, 4, 2), prefill_tokens=16, decode_tokens=4, seed=1)
    after, changes = done.trace, done.changes
    for name in ("request_ids", "positions", "phases", "domain_ids"):
        np.testing.assert_array_equal(getattr(after, name), getattr(trace, name))
    assert after.meta.layer_ids == trace.meta.layer_ids
    assert changes.choices == int((np.asarray(trace.expert_ids) >= 0).sum())
    assert changes.choices_after == int((np.asarray(after.expert_ids).astype(int) >= 0).sum())
    assert changes.choices == changes.kept + changes.moved + changes.dropped
    assert changes.choices_after == changes.kept + changes.moved + changes.added
    assert min(changes.kept, changes.moved, changes.dropped, changes.added) >= 0
    assert changes.gate_mass_kept is not None
    assert 0 <= changes.gate_mass_kept <= 1 + 1e-6
    gates = np.asarray(after.gate_weights)
    assert (gates >= 0).all()
    assert (gates[np.asarray(after.expert_ids).astype(int) < 0] == 0).all()
    again = reroute(trace, spec, in_order(trace, 4, 2), prefill_tokens=16, decode_tokens=4, seed=1)
    assert again.trace.content_hash() == after.content_hash()


@pytest.mark.parametrize("spec", SPECS)
def test_the_new_trace_is_one(spec: str, tmp_path: Path) -> None:
    trace = made(3, 6, 0.0)
    done = reroute(trace, spec, in_order(trace, 4, 2)).trace
    save_trace(done, tmp_path / "t.npz")
    back = load_trace(tmp_path / "t.npz")
    assert back.content_hash() == done.content_hash()
    note = back.meta.source["reroute"][-1]
    assert note["rule"] == spec.partition(":")[0]
    assert note["of"] == trace.content_hash()


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_missing_is_named(spec: str) -> None:
    """Each need of a rule, taken away, is named with its remedy."""
    trace = made(3, 6, 0.0)
    rule = parse_rule(spec)
    lacking: dict[str, Any] = {
        "gates": {"gate_weights": None},
        "candidates": {"candidate_ids": None, "candidate_scores": None},
        "domains": {"domain_ids": None},
        "plan": {},
    }
    for need in rule.needs(trace):
        poorer = Trace(**{**trace.arrays(), **lacking[need]}, meta=trace.meta)
        places = None if need == "plan" else in_order(trace, 4, 2)
        with pytest.raises(MismatchError) as caught:
            reroute(poorer, spec, places)
        what, remedy = REMEDIES[need]
        assert caught.value.cause == f"rule {rule.NAME} needs {what}"
        assert caught.value.remedy == remedy


def test_every_rule_runs_on_the_sample_with_candidates() -> None:
    """What ships is enough for every rule: two domains of it, 48 tokens of each request."""
    whole = load_token_trace("sample:debian-olmoe-scores", "a test")
    trace = slice_trace(whole, SliceSpec(domains=("c", "man"), per_request=48))
    firsts = {spec.partition(":")[0]: spec for spec in reversed(SPECS)}
    firsts |= {"steer": "steer:toward=c", "prune": "prune:keep=48", "merge": "merge:keep=48"}
    firsts |= {"group-limit": "group-limit:groups=8,keep=2", "k": "k:k=4"}
    for rule in OWN:
        done = reroute(trace, firsts[rule], in_order(trace, 8))
        assert done.trace.num_tokens == trace.num_tokens
        assert done.changes.gate_mass_kept is not None

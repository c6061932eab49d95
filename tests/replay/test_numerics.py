"""One rank in this process: kernels, checks that must fail, memory, and what is imported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'moesim[torch]')")

import torch

from moesim.errors import InputError
from moesim.replay.engine import ReplayEngine
from moesim.replay.memory import memory_need
from moesim.replay.numerics import NumericsError, check_layer
from moesim.replay.ops import Kernels, grouped_ffn, reduce_rows
from moesim.replay.process import Context, Watchdog, joined
from moesim.replay.routing import assign_replicas, rank_work
from moesim.replay.shape import ExpertShape
from moesim.replay.validate import ValidateOptions, validate
from moesim.trace.format import load_token_trace

torch.set_num_threads(1)


@pytest.fixture
def ctx() -> Context:
    """A lone rank without a process group."""
    return Context(0, 1, 0, torch.device("cpu"), 60.0, Watchdog(60.0, print))


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Context]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("moesim.replay.process.die_with_parent", lambda: None)
    with joined("cpu", 60.0) as found:
        yield found


def layer_of(inputs, ctx: Context, shape: ExpertShape, kernels: Kernels, dedup: str = "gpu"):
    trace = load_token_trace(inputs.trace, "test").take(slice(200))
    placement = np.array([3, 0, 1, 2, 7, 6, 5, 4, -1])
    engine = ReplayEngine(ctx, shape, len(placement), 200, kernels, num_sets=1)
    ids = np.asarray(trace.expert_ids[:, 1])
    gates = np.asarray(trace.gate_weights[:, 1])
    assignment = assign_replicas(ids, gates, placement, np.zeros(200, np.int64), 1)
    tables = engine.upload(rank_work(assignment, 0, dedup))
    return engine, tables, assignment, ids, placement


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kernel", ["loop", "grouped_mm"])
@pytest.mark.parametrize("dedup", ["gpu", "none"])
def test_layer_matches_float64(inputs, ctx: Context, dtype: str, kernel: str, dedup: str) -> None:
    if kernel == "grouped_mm" and dtype == "fp16":
        pytest.skip("torch's CPU grouped_mm takes bf16 and fp32")
    shape = ExpertShape("tiny", 64, 32, 8, 2, dtype)
    engine, tables, assignment, ids, placement = layer_of(
        inputs, ctx, shape, Kernels(ffn=kernel), dedup
    )
    found = check_layer(engine, tables, assignment, ids, placement, dedup=dedup, num_samples=50)
    assert found.num_choices == int((ids >= 0).sum())
    assert found.num_sampled_tokens == 50
    assert 0 < found.relative_error < {"fp32": 1e-6, "bf16": 1e-2, "fp16": 2e-3}[dtype]


def test_reductions_agree() -> None:
    rng = torch.Generator().manual_seed(0)
    source = torch.randn(40, 16, generator=rng)
    idx = torch.randperm(40, generator=rng)
    ptr = torch.tensor([0, 0, 5, 6, 40])
    groups = torch.repeat_interleave(torch.arange(4), ptr.diff())
    weights = torch.rand(40, generator=rng)
    for w in (weights, None):
        one = reduce_rows(source, idx, ptr, w, groups, "embedding_bag")
        two = reduce_rows(source, idx, ptr, w, groups, "index_add")
        torch.testing.assert_close(one, two)
        assert (one[0] == 0).all()


def test_no_rows_at_all() -> None:
    empty = torch.zeros(0, 16)
    offsets = torch.zeros(3, dtype=torch.int32)
    out = grouped_ffn(empty, torch.ones(3, 8, 16), torch.ones(3, 16, 4), offsets, [0, 0, 0], "loop")
    assert out.shape == (0, 16)
    none = torch.zeros(0, dtype=torch.int64)
    ptr = torch.zeros(5, dtype=torch.int64)
    assert (reduce_rows(empty, none, ptr, None, none, "embedding_bag") == torch.zeros(4, 16)).all()


def test_wrong_weights_are_found(inputs, ctx: Context) -> None:
    """The float64 check sees two experts exchanged after loading."""
    shape = ExpertShape("tiny", 64, 32, 8, 2, "fp32")
    engine, tables, assignment, ids, placement = layer_of(inputs, ctx, shape, Kernels())
    wrong = placement.copy()
    wrong[[0, 1]] = placement[[1, 0]]
    loading = engine.load_weights
    engine.load_weights = lambda _, set_idx=0: loading(wrong, set_idx)  # type: ignore[method-assign]
    with pytest.raises(NumericsError, match="relative error"):
        check_layer(engine, tables, assignment, ids, placement)


def test_nan_is_a_failure(inputs, ctx: Context) -> None:
    shape = ExpertShape("tiny", 64, 32, 8, 2, "fp32")
    engine, tables, assignment, ids, placement = layer_of(inputs, ctx, shape, Kernels())
    engine.inputs[0][7, 3] = float("nan")
    with pytest.raises(NumericsError, match="relative error inf"):
        check_layer(engine, tables, assignment, ids, placement)


@pytest.mark.parametrize("fault", ["misrouted", "doubled", "unwritten"])
def test_conservation_sees_faults(inputs, ctx: Context, fault: str) -> None:
    """INV-1: a choice served by the wrong slot, twice, or not at all is not an exact result."""
    shape = ExpertShape("tiny", 64, 32, 8, 2, "bf16")
    engine, tables, assignment, ids, placement = layer_of(inputs, ctx, shape, Kernels())
    if fault == "misrouted":
        first = tables.expand_idx.clone()
        first[[0, -1]] = first[[-1, 0]]
        broken = replace(tables, expand_idx=first)
    elif fault == "doubled":
        sums = tables.reduce_idx.clone()
        sums[1] = sums[0]
        broken = replace(tables, reduce_idx=sums)
    else:
        pack = tables.pack_idx.clone()
        pack[0] = pack[1]
        broken = replace(tables, pack_idx=pack)
    with pytest.raises(NumericsError, match="lost, doubled or served by the wrong expert"):
        check_layer(engine, broken, assignment, ids, placement)


def test_replicas_hold_the_same_weights(ctx: Context) -> None:
    shape = ExpertShape("tiny", 64, 32, 8, 2, "fp32")
    engine = ReplayEngine(ctx, shape, 3, 4, Kernels(), num_sets=1)
    engine.load_weights(np.array([5, 2, 5]))
    assert torch.equal(engine.gate_up[0][0], engine.gate_up[0][2])
    assert not torch.equal(engine.gate_up[0][0], engine.gate_up[0][1])


def test_memory_need_by_hand() -> None:
    # 2 sets x 3 slots x 3*64*32*4 bytes = 147,456 bytes of weights.
    # Rows of 256 bytes: 2*10 inputs + 3*(10+20) in flight + 2*20 expanded and result + 10 out = 160
    # rows = 40,960 bytes; intermediates 3 * 20 * 32 * 4 = 7,680 bytes; together x 1.25 = 60,800.
    need = memory_need(ExpertShape("tiny", 64, 32, 8, 2, "fp32"), 3, 2, 10, 20, on_gpu=False)
    assert (need.weight_bytes, need.activation_bytes) == (147_456, 60_800)


def test_too_little_memory_is_refused_before_allocating(inputs, monkeypatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("allocated although memory is short")

    one = inputs.add_plan("one_gpu", list(range(8)), 1)
    monkeypatch.setattr("moesim.replay.validate.ReplayEngine", never)
    alone = Context(0, 1, 0, torch.device("cpu"), 60.0, Watchdog(60.0, print))
    options = ValidateOptions(tokens_per_rank=(8,), num_batches=1, memory_limit_bytes=1_000_000)
    with pytest.raises(
        InputError, match=r"needs .* MB on each GPU .* rank 0 has 1\.00 MB"
    ) as caught:
        validate(alone, [str(one)], str(inputs.trace), inputs.shape, options, None)
    assert "--weight-sets 1" in caught.value.remedy


def test_one_rank_end_to_end(inputs, group: Context) -> None:
    one = inputs.add_plan("alone", list(range(8)), 1)
    options = ValidateOptions(tokens_per_rank=(8, 40), num_batches=1, budget_s=0.02)
    record = validate(group, [str(one)], str(inputs.trace), inputs.shape, options, None)
    assert [r["tokens_per_rank"] for r in record["results"]] == [8, 40]
    assert all(np.min(r["layer_us"]["median"]) > 0 for r in record["results"])
    assert [c["num_choices"] > 0 for c in record["checks"]] == [True, True]

"""Ways to spread the experts of a layer: times by hand, crossovers, what is refused."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from benchmarks.parallelism_times import (
    WAYS,
    LayerTimes,
    best_way,
    crossovers,
    layer_times,
)
from moesim.errors import InputError, UnknownNameError
from moesim.serving.moe_load import MoeLoad

EVEN = MoeLoad(np.full((1, 4), 0.5), "every token chooses half of four experts")


def times(build: ModuleType, way: str, tokens: list[int], load: MoeLoad = EVEN) -> LayerTimes:
    """Four GPUs in two nodes, four experts, top-2; see builders.toy_calibration."""
    return layer_times(
        way,
        build.toy_model(2, 4, 2),
        build.small_cluster(),
        load,
        tokens,
        build.toy_calibration(),
    )


def test_gathered_bytes_by_hand(build: ModuleType) -> None:
    # 100 tokens of each of 4 GPUs, 2,000 bytes each: 800,000 bytes gathered on every GPU. 3/4 of
    # it comes from others, at 1 GB/s: 10 + 600 us. Half of it from the other node, through two
    # NICs together: 20 + 200,000 B / 0.5 GB/s = 420 us. The larger counts, and twice: gather and
    # scatter.
    for way in ("tp", "ep_gather"):
        found = times(build, way, [100])
        assert found.communication_us[0] == pytest.approx(2 * 610.0)


def test_gathered_weights_by_hand(build: ModuleType) -> None:
    # 4 experts of 600,000 bytes: 2.4 MB, of which 3/4 from others: 10 + 1,800 us, whatever the
    # tokens; the NICs carry 2.4 / 2 / 2 = 0.6 MB: 20 + 1,200 us.
    found = times(build, "dp_gather", [1, 1000])
    assert found.communication_us.tolist() == pytest.approx([1810.0, 1810.0])
    own = times(build, "dp", [1, 1000])
    assert own.communication_us.tolist() == [0.0, 0.0]
    np.testing.assert_allclose(own.experts_us, found.experts_us)


def test_messages_by_hand(build: ModuleType) -> None:
    # top-2 over 4 GPUs: 4 (1 - (3/4)^2) = 1.75 GPUs per token, 3/4 of them others; 100 tokens of
    # 2,000 bytes: 262,500 B: 10 + 262.5 us. deepep_ll sends 2 copies: 300,000 B; half of those to
    # the other node: 200,000 B at 0.5 GB/s: 420 us. nccl: 175,000 B there: 20 + 350 us. deepep:
    # 2 (1 - 1/4) = 1.5 nodes, half of them the other one: 150,000 B: 20 + 300 us.
    found = times(build, "ep", [100])
    assert found.library == ("deepep",)
    assert found.communication_us[0] == pytest.approx(2 * 320.0)


def test_compute_by_hand(build: ModuleType) -> None:
    # Everyone chooses experts 0 and 1 for certain, so that 100 tokens of each GPU are 400 for each
    # of them. An expert of n tokens takes 0.6 us + n 2 x 300,000 / 10e6 us = 0.6 + 0.06 n, a launch
    # 5 us. ep: 5 + 24.6. tp: a quarter of the width of both: 5 + 2 x 24.6 / 4. dp: 100 tokens of
    # both: 5 + 2 x 6.6.
    load = MoeLoad(np.array([[1.0, 1.0, 0.0, 0.0]]), "two experts")
    assert times(build, "ep", [100], load).experts_us[0] == pytest.approx(29.6)
    assert times(build, "ep_gather", [100], load).experts_us[0] == pytest.approx(29.6)
    assert times(build, "tp", [100], load).experts_us[0] == pytest.approx(17.3)
    assert times(build, "dp", [100], load).experts_us[0] == pytest.approx(18.2)


def test_weights_of_a_gpu(build: ModuleType) -> None:
    # 2 layers x 4 experts x 600,000 B = 4.8 MB; a layer is 2.4 MB.
    assert times(build, "dp", [1]).weight_bytes == 4.8e6
    assert times(build, "tp", [1]).weight_bytes == 1.2e6
    assert times(build, "ep", [1]).weight_bytes == 1.2e6
    assert times(build, "dp_gather", [1]).weight_bytes == 3.6e6


@pytest.mark.parametrize("way", WAYS)
def test_more_tokens_never_take_less_time(build: ModuleType, way: str) -> None:
    found = times(build, way, [2**i for i in range(14)]).total_us
    assert np.all(np.diff(found) >= 0)


def way(name: str, total: list[float], fits: bool = True) -> LayerTimes:
    us = np.array(total)
    return LayerTimes(name, us, np.zeros(len(us)), ("",) * len(us), 1.0, fits, "measured", ())


def test_crossovers_by_hand() -> None:
    # 1 us per token against 4 us: equal at 4 tokens. What does not fit is no choice.
    tokens = [1, 2, 8, 16]
    linear, flat = way("a", [1, 2, 8, 16]), way("b", [4, 4, 4, 4])
    free = way("c", [0.1, 0.1, 0.1, 0.1], fits=False)
    assert best_way([linear, flat, free]) == ["a", "a", "b", "b"]
    ((at, old, new),) = crossovers(tokens, [linear, flat, free])
    assert (at, old, new) == (pytest.approx(4.0), "a", "b")
    assert best_way([free]) == []
    assert crossovers(tokens, [free]) == []


def test_what_is_refused(build: ModuleType) -> None:
    with pytest.raises(UnknownNameError, match="unknown way to spread experts 'pp'"):
        times(build, "pp", [1])
    few = build.toy_model(1, 2, 1)
    with pytest.raises(InputError, match="2 experts for 4 GPUs"):
        layer_times("ep", few, build.small_cluster(), EVEN, [1], build.toy_calibration())
    odd = build.toy_model(1, 4, 2, moe_intermediate_size=102)
    with pytest.raises(InputError, match="width 102 are not cut in 4"):
        layer_times("tp", odd, build.small_cluster(), EVEN, [1], build.toy_calibration())

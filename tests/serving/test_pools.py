"""Several models for one stream of requests: pools of their own, whole models in three tiers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli.main import run
from moesim.errors import InfeasibleError, InputError
from moesim.jobs.arrivals import arriving_requests
from moesim.jobs.serve import serve
from moesim.jobs.serve_composition import serve_composition
from moesim.jobs.serve_pools import serve_pools
from moesim.serving.composition import DRAM, HBM, NVME, Tiers, serve_in_order

PROCESS = "poisson:rate=10,requests=80,prompt=300,output=10"
SMALL, LARGE = "small:model=OLMoE-1B-7B,gpus=1", "large:model=Mixtral-8x7B,gpus=4"


def test_tiers_by_hand() -> None:
    """One model in HBM, two in host memory; copies of 10 us and 100 us more from NVMe; first tokens
    in 5, the rest in 1. Models asked for: 0 (HBM), 1 (host: 10), 1 (HBM), 2 (NVMe: 110, takes the
    place of 0 in host memory), 0 (NVMe). Each begins as the one before ends."""
    asked, first = np.array([0, 1, 1, 2, 0]), np.full(5, 5.0)
    out = serve_in_order(np.zeros(5), asked, first, np.ones(5), Tiers(1, 2, 10.0, 100.0))
    assert out.tier.tolist() == [HBM, DRAM, HBM, NVME, NVME]
    assert out.finish_us.tolist() == [6.0, 22.0, 28.0, 144.0, 260.0]
    assert (out.ready_us - out.begin_us).tolist() == [0.0, 10.0, 0.0, 110.0, 110.0]
    late = serve_in_order(np.array([0.0, 50.0]), asked[:2], first, np.ones(5), Tiers(2, 2, 10.0, 0))
    assert late.begin_us.tolist() == [0.0, 50.0]


def test_more_memory_never_copies_more_and_every_model_in_hbm_never_copies() -> None:
    """LRU is a stack algorithm: what a smaller memory holds, a larger one holds (INV-9)."""
    asked = np.random.default_rng(0).zipf(1.3, 400) % 20
    ones = np.ones(400)
    copies = [
        (serve_in_order(ones, asked, ones, ones, Tiers(h, 20, 9.0, 0)).tier > HBM).sum()
        for h in (1, 2, 5, 10, 20)
    ]
    assert copies == sorted(copies, reverse=True)
    assert copies[-1] == 0


def test_a_composition_says_where_models_were_and_what_does_not_fit() -> None:
    result = serve_composition(
        "poisson:rate=1,requests=60,prompt=200,output=20",
        whole_models=40,
        model="OLMoE-1B-7B",
        cluster="h100-sxm-ib",
        gpus=1,
    )
    said = result.to_json()
    assert sum(said["found_in"].values()) == pytest.approx(1.0)
    assert 1 <= said["hbm_models"] < 40
    assert 0 < said["figures"]["copying_share"] < 1
    assert "with all models in HBM: " in result.summary()
    with pytest.raises(InfeasibleError, match="do not fit: HBM holds"):
        serve_composition(PROCESS, whole_models=100_000, model="Mixtral-8x7B", gpus=8)


def test_pools_are_services_of_their_own(tmp_path: Path) -> None:
    """By a column, the small pool is the run of its rows alone, at their times; costs add up."""
    rows = [f"{i / 10},300,10,{'small' if i % 3 else 'large'}" for i in range(60)]
    head = "arrived_at,num_prefill_tokens,num_decode_tokens,tier"
    (tmp_path / "log.csv").write_text("\n".join([head, *rows]) + "\n")
    both = serve_pools(tmp_path / "log.csv", [SMALL, LARGE], by="tier")
    asked = {n: p.record["requests"]["num_requests"] for n, p in both.pools.items()}
    assert asked == {"small": 40, "large": 20}
    labelled = arriving_requests(tmp_path / "log.csv", seed=0, label="tier")
    own = labelled.picked(np.flatnonzero(np.array(labelled.labels) == "small"))
    alone = serve(own, model="OLMoE-1B-7B", gpus=1)
    assert alone.record["metrics"] == both.pools["small"].record["metrics"]
    each = [p.record["metrics"]["cost_usd_per_hour"] for p in both.pools.values()]
    assert both.cost_usd_per_hour == pytest.approx(sum(each))
    with pytest.raises(InputError, match="for which there is no pool"):
        serve_pools(tmp_path / "log.csv", [SMALL, "other:model=OLMoE-1B-7B"], by="tier")
    with pytest.raises(InputError, match="no column 'kind'"):
        serve_pools(tmp_path / "log.csv", [SMALL, LARGE], by="kind")


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    shares: list[str] = []
    for text, share in ((SMALL, 0.75), (LARGE, 0.25)):
        shares += ["--pool", f"{text},share={share}"]
    assert run(["serve", "--requests", PROCESS, *shares, "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    counts = [p["requests"]["num_requests"] for p in said["pools"].values()]
    assert sum(counts) == 80
    assert counts[0] > counts[1]
    assert run(["serve", "--requests", PROCESS, *shares, "--slo", "ttft_p99<60s"]) == 0
    assert "dollars per hour of all pools" in capsys.readouterr().out
    for wrong, cause in (
        (["--pool", SMALL], "two pools or more"),
        ([*shares[:2], "--pool", LARGE], "do not sum to 1"),
        ([*shares, "--gpus", "4"], "`--gpus` with `--pool`"),
        (["--model", "OLMoE-1B-7B", "--by", "tier"], "--by"),
        (["--whole-models", "3"], "--model"),
    ):
        assert run(["serve", "--requests", PROCESS, *wrong]) == 2
        assert cause.replace("`", "") in capsys.readouterr().err.replace("`", "")

"""The hooks on stand-ins for vLLM's classes: layers, steps of both model runners, refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moesim.errors import InputError, MismatchError
from moesim.placement import Placement, Plan

torch = pytest.importorskip("torch", reason="the plug-in needs torch")

from moesim.engine import vllm, vllm_hooks  # noqa: E402
from moesim.engine.content import build_content, save_content  # noqa: E402

IDS = np.array([[[0, 1], [2, 3]], [[2, 0], [1, 3]], [[3, 2], [0, 1]]])


class Router:
    """As RoutingSimulatorRouter: mapping after routing, a hook for each."""

    def __init__(self, top_k: int, experts: int) -> None:
        self.top_k, self.global_num_experts = top_k, experts

    def _compute_routing(
        self, hidden: Any, logits: Any, dtype: Any, *, input_ids: Any = None
    ) -> Any:
        return "its own"

    def _apply_eplb_mapping(self, ids: Any) -> Any:
        return ids

    def select(self, tokens: int) -> Any:
        _, ids = self._compute_routing(torch.zeros(tokens, 1), None, torch.int32)
        return self._apply_eplb_mapping(ids)


class FirstRunner:
    """The part of the first model runner that the hooks use."""

    def __init__(self, config: Any) -> None:
        self.vllm_config, self.device, self.eplb_state = config, torch.device("cpu"), None
        self.input_batch: Any = None

    def _prepare_inputs(self, scheduler_output: Any, scheduled: Any) -> str:
        return "prepared"

    def _dummy_run(self, tokens: int) -> int:
        return tokens


class SecondRunner(FirstRunner):
    def prepare_inputs(self, *_: Any) -> Any:
        return self.input_batch

    def _dummy_run(self, tokens: int) -> int:
        return tokens


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Fresh classes under vLLM's module names, and no replay in the process."""
    router = type("Router", (Router,), {})
    routers = SimpleNamespace(
        RoutingSimulatorRouter=router,
        RoutingStrategy=object,
        RoutingSimulator=SimpleNamespace(register_strategy=lambda name, it: None),
    )
    first, second = type("First", (FirstRunner,), {}), type("Second", (SecondRunner,), {})
    for name, module in (
        (vllm_hooks.ROUTER, routers),
        (vllm_hooks.RUNNERS[0], SimpleNamespace(GPUModelRunner=first)),
        (vllm_hooks.RUNNERS[1], SimpleNamespace(GPUModelRunner=second)),
    ):
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[misc]
    monkeypatch.setitem(vllm_hooks._now, "replay", None)
    return SimpleNamespace(router=router, first=first, second=second)


def config_of(router: type, experts: int = 4, top_k: int = 2, **moe: Any) -> Any:
    """Two MoE layers, numbers 3 and 7."""
    names = ["model.layers.3.mlp.experts", "model.layers.7.mlp.experts"]
    method = SimpleNamespace(is_monolithic=False)
    layers = {
        name: SimpleNamespace(
            runner=SimpleNamespace(
                router=router(top_k, experts),
                moe_config=SimpleNamespace(
                    ep_size=moe.get("ep_size", 1), is_sequence_parallel=False
                ),
                _quant_method=method,
                do_naive_dispatch_combine=moe.get("naive", False),
            )
        )
        for name in names
    }
    return SimpleNamespace(
        compilation_config=SimpleNamespace(
            static_all_moe_layers=names,
            static_forward_context=layers,
            cudagraph_capture_sizes=[8],
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=16),
        parallel_config=SimpleNamespace(data_parallel_rank=0, enable_dbo=moe.get("dbo", False)),
        speculative_config=moe.get("speculative"),
    )


def start(engine: SimpleNamespace, path: Path, build: ModuleType, plan: Any = None) -> None:
    save_content(build_content(build.make_trace(IDS, 4), (3, 7), plan=plan), path)
    vllm_hooks.install("moesim_replay", str(path))


def routers(config: Any) -> list[Any]:
    return [v.runner.router for v in config.compilation_config.static_forward_context.values()]


def test_nothing_happens_without_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is not even imported: its module would be missing."""
    monkeypatch.delenv("MOESIM_REPLAY", raising=False)
    vllm.register()
    assert vllm_hooks.ROUTER not in sys.modules


def test_the_first_runner_replays_its_batch(
    engine: SimpleNamespace, tmp_path: Path, build: ModuleType
) -> None:
    """A prompt of 3 takes the only request's 3 rows; layer 7 is the trace's second."""
    start(engine, tmp_path / "r.npz", build)
    config = config_of(engine.router)
    runner = engine.first(config)
    assert runner._dummy_run(8) == 8
    runner.input_batch = SimpleNamespace(
        req_ids=["a"], num_computed_tokens_cpu=np.array([0, 9]), num_prompt_tokens=np.array([3, 9])
    )
    assert runner._prepare_inputs(None, np.array([3], np.int32)) == "prepared"
    found = [router.select(3).tolist() for router in routers(config)]
    assert found == IDS.transpose(1, 0, 2).tolist()


def test_the_second_runner_replays_the_batch_that_it_returns(
    engine: SimpleNamespace, tmp_path: Path, build: ModuleType
) -> None:
    start(engine, tmp_path / "r.npz", build)
    config = config_of(engine.router)
    runner = engine.second(config)
    runner.input_batch = SimpleNamespace(
        num_reqs=1,
        req_ids=["a"],
        num_scheduled_tokens=np.array([2]),
        num_computed_tokens_np=np.array([1]),
        prefill_len_np=np.array([3]),
    )
    runner.prepare_inputs(None, None)
    assert routers(config)[1].select(2).tolist() == IDS[1:, 1].tolist()


def test_the_check_counts_what_the_routers_sent(
    engine: SimpleNamespace, tmp_path: Path, build: ModuleType
) -> None:
    """2 tokens x 2 layers x top-2 = 8, of a pass padded to 4 rows."""
    start(engine, tmp_path / "r.npz", build)
    config = config_of(engine.router)
    runner = engine.first(config)
    runner._dummy_run(4)
    worker = vllm.WorkerExtension()
    worker.moesim_reset(counting=True)
    runner.input_batch = SimpleNamespace(
        req_ids=["a"], num_computed_tokens_cpu=np.array([0]), num_prompt_tokens=np.array([3])
    )
    runner._prepare_inputs(None, np.array([2]))
    for router in routers(config):
        router.select(4)
    found = worker.moesim_check()
    assert (found["choices"], found["counted"], found["wrong_layers"]) == (8, 8, [])


def test_replicas_go_into_the_balancers_maps(
    engine: SimpleNamespace, tmp_path: Path, build: ModuleType
) -> None:
    """Slots 0,1,2,3,0,1: experts 0 and 1 have two homes, 4 and 5 the second."""
    table = np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 2, 3]], np.int32)
    start(engine, tmp_path / "r.npz", build, Plan("toy", (0, 1), Placement(table, 2, 1, 4)))
    model = SimpleNamespace(
        physical_to_logical_map=torch.zeros(2, 6, dtype=torch.int64),
        logical_to_physical_map=torch.zeros(2, 4, 9, dtype=torch.int64),
        logical_replica_count=torch.zeros(2, 4, dtype=torch.int64),
    )
    runner = engine.first(config_of(engine.router, experts=6, ep_size=2))
    runner.eplb_state = SimpleNamespace(
        model_states={"m": model}, expert_rearrangement_step_interval=5
    )
    runner._dummy_run(1)
    assert model.physical_to_logical_map.tolist() == table.tolist()
    assert model.logical_replica_count.tolist() == [[2, 2, 1, 1], [1, 1, 2, 2]]
    assert model.logical_to_physical_map[0, :, :3].tolist() == [
        [0, 4, -1],
        [1, 5, -1],
        [2, -1, -1],
        [3, -1, -1],
    ]
    assert runner.eplb_state.expert_rearrangement_step_interval > 1 << 60


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"experts": 8}, "8 slots, the replay 4"),
        ({"top_k": 3}, "3 experts per token, the replay 2"),
        ({"naive": True}, "gathers other ranks' tokens"),
        ({"dbo": True}, "dual-batch overlap"),
        ({"speculative": object()}, "speculative decoding"),
    ],
)
def test_engines_that_it_cannot_replay_are_refused(
    engine: SimpleNamespace,
    tmp_path: Path,
    build: ModuleType,
    changes: dict[str, Any],
    word: str,
) -> None:
    start(engine, tmp_path / "r.npz", build)
    runner = engine.first(config_of(engine.router, **changes))
    with pytest.raises((InputError, MismatchError), match=word):
        runner._dummy_run(1)


def test_another_number_of_ranks_than_the_plans_is_refused(
    engine: SimpleNamespace, tmp_path: Path, build: ModuleType
) -> None:
    plan = Plan("toy", (0, 1), Placement(np.array([[3, 1, 0, 2]] * 2, np.int32), 2, 1, 4))
    start(engine, tmp_path / "r.npz", build, plan)
    with pytest.raises(MismatchError, match="1 expert-parallel ranks, the replay 2"):
        engine.first(config_of(engine.router))._dummy_run(1)

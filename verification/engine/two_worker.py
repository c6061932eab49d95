"""What every worker of the two-GPU study answers, through vLLM's `collective_rpc`."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moesim.engine.content import Content, load_content
from moesim.engine.schedule import PhaseRows
from moesim.engine.vllm import WorkerExtension


def placed(base: Content, physical_to_logical: np.ndarray, redundant: bool) -> Content:
    """`base` under a placement [L, P]: experts renumbered, or vLLM's maps where slots are
    redundant."""
    slots = physical_to_logical[base.layer_of].astype(np.int32)
    if redundant:
        return replace(base, physical_to_logical=slots, num_gpus=2, placement="eplb")
    slot_of = np.argsort(physical_to_logical, axis=1)
    table = np.stack([slot_of[i][layer] for i, layer in enumerate(base.table)])
    return replace(
        base,
        table=table.astype(base.table.dtype),
        physical_to_logical=slots,
        num_gpus=2,
        placement="renumbered",
    )


class Extension(WorkerExtension):
    """Placements by name, times of passes, profiles, and vLLM's own balancer."""

    def two_load(self, folder: str, key: str, redundant: bool) -> int:
        """Read every placement; time the passes from now on."""
        base = load_content(f"{folder}/{key}.replay.npz")
        plans = np.load(f"{folder}/{key}.plans.npz")
        self._two = {
            name: placed(base, plans[name], redundant)
            for name in plans.files
            if name.endswith("+") == redundant
        }
        self._two_events: list[Any] = []
        runner = self.model_runner  # type: ignore[attr-defined]
        run, events = runner.execute_model, self._two_events

        def timed(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            if not scheduler_output.total_num_scheduled_tokens:
                return run(scheduler_output, *args, **kwargs)
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            began = time.perf_counter()
            out = run(scheduler_output, *args, **kwargs)
            last.record()
            events.append((first, last, time.perf_counter() - began))
            return out

        runner.execute_model = timed
        return len(self._two)

    def two_use(self, name: str, counting: bool = False) -> None:
        """Serve placement `name` from the next pass on."""
        from moesim.engine import vllm_hooks

        torch.cuda.synchronize()
        replay = vllm_hooks.current()
        replay.counting = counting
        replay.swap(self._two[name])
        vllm_hooks.set_maps(self.model_runner, replay.content)  # type: ignore[attr-defined]
        torch.cuda.synchronize()

    def two_times(self) -> list[tuple[float, float]]:
        """(GPU ms, host ms) of every pass since the last call."""
        torch.cuda.synchronize()
        found = [(round(a.elapsed_time(b), 4), round(h * 1e3, 4)) for a, b, h in self._two_events]
        self._two_events.clear()
        return found

    def two_memory(self) -> dict[str, int]:
        """Bytes, as the worker knows them."""
        names = ("available_kv_cache_memory_bytes", "peak_activation_memory", "non_torch_memory")
        found = {n: int(getattr(self, n, -1)) for n in (*names, "requested_memory")}
        weights = int(self.model_runner.model_memory_usage)  # type: ignore[attr-defined]
        return {"weights": weights, **found}

    def two_profile(self, start: bool) -> list[list[Any]]:
        """Start a profile, or stop it: [kernel, microseconds, launches] of the longest."""
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        if start:
            self._two_profile = profile(activities=[ProfilerActivity.CUDA])
            self._two_profile.__enter__()
            return []
        self._two_profile.__exit__(None, None, None)
        averages = self._two_profile.key_averages()
        rows = [[e.key[:160], round(e.device_time_total, 2), e.count] for e in averages]
        return sorted((r for r in rows if r[1] > 0), key=lambda r: -r[1])[:40]

    # vLLM's own balancer

    def two_balancer(self, folder: str, key: str) -> dict[str, Any]:
        """Read the two domains of the drift; log every rearrangement and committed layer."""
        from vllm.distributed.eplb import eplb_state

        base = load_content(f"{folder}/{key}.replay.npz")
        raw = np.load(f"{folder}/{key}.drift.npz")
        slots = self._two["linear+"].physical_to_logical
        self._two_domains = {
            name: replace(
                base,
                prefill=PhaseRows(raw[f"{name}_prefill_order"], raw[f"{name}_prefill_starts"]),
                decode=PhaseRows(raw[f"{name}_decode_order"], raw[f"{name}_decode_starts"]),
                physical_to_logical=slots,
                num_gpus=2,
                placement="eplb",
            )
            for name in ("intent", "summary")
        }
        state = self._two_eplb()
        self._two_log: list[Any] = []
        log, rearrange, move = self._two_log, state.rearrange, eplb_state._move_to_workspace

        def logged(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.synchronize()
            began = time.perf_counter()
            out = rearrange(*args, **kwargs)
            torch.cuda.synchronize()
            log.append(("rearrange", began, time.perf_counter()))
            return out

        def moved(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            out = move(*args, **kwargs)
            log.append(("layer", began, time.perf_counter()))
            return out

        state.rearrange, eplb_state._move_to_workspace = logged, moved
        (model,) = state.model_states.values()
        first = [list(w.shape) for w in model.model.expert_weights[0]]
        size = sum(w[0].numel() * w.element_size() for w in model.model.expert_weights[0])
        return {"weights_of_a_layer": first, "bytes_per_expert": size}

    def _two_eplb(self) -> Any:
        return self.model_runner.eplb_state  # type: ignore[attr-defined]

    def two_way(self, synchronous: bool, backend: str) -> str:
        """Rearrange in the step or beside it; `backend` moves the weights, "" the engine's own."""
        from vllm.distributed.eplb.eplb_communicator import create_eplb_communicator
        from vllm.distributed.parallel_state import get_eplb_group

        state = self._two_eplb()
        (model,) = state.model_states.values()
        if not hasattr(self, "_two_own"):
            self._two_own = model.communicator
        state.is_async = not synchronous
        model.communicator = self._two_own
        if backend:
            model.communicator = create_eplb_communicator(
                group_coordinator=get_eplb_group(),
                backend=backend,
                expert_weights=model.model.expert_weights,
                expert_buffer=model.expert_buffer,
            )
        return type(model.communicator).__name__

    def two_domain(self, name: str) -> None:
        """Take the tokens of a domain; the maps stay."""
        from moesim.engine import vllm_hooks

        torch.cuda.synchronize()
        replay = vllm_hooks.current()
        replay.swap(self._two_domains[name])

    def two_after(self, steps: int) -> None:
        """Let the balancer rearrange after so many steps; 0: not again."""
        state = self._two_eplb()
        interval = state.expert_rearrangement_step + steps if steps else sys.maxsize
        state.expert_rearrangement_step_interval = interval

    def two_busy(self) -> bool:
        """Whether an asynchronous rearrangement is still under way."""
        (model,) = self._two_eplb().model_states.values()
        return bool(model.rebalanced)

    def two_maps(self) -> Any:
        """[L, P] the experts of the slots now."""
        (model,) = self._two_eplb().model_states.values()
        return model.physical_to_logical_map.cpu().numpy().astype(np.int16)

    def two_log(self) -> list[Any]:
        """What the balancer did since the last call, by this process's clock."""
        found = list(self._two_log)
        self._two_log.clear()
        return found

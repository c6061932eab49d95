"""The plug-in for vLLM 0.23 and newer: entry point `moesim_replay` of `vllm.general_plugins`.

Loaded in every process of the engine; does nothing unless MOESIM_REPLAY names a replay file. vLLM
makes a `RoutingSimulatorRouter` for every MoE layer where VLLM_MOE_ROUTING_SIMULATION_STRATEGY is
set; the plug-in answers in its place, and learns each step's tokens from the model runner
(`vllm_hooks` holds what differs by version). `WorkerExtension` adds calls for
`LLM.collective_rpc`.
"""

from __future__ import annotations

import os
from typing import Any

from moesim.engine.launch import STRATEGY


def register() -> None:
    """The entry point."""
    if not os.environ.get("MOESIM_REPLAY"):
        return
    from moesim.engine import vllm_hooks

    vllm_hooks.install(STRATEGY, os.environ["MOESIM_REPLAY"])


class WorkerExtension:
    """`LLM(worker_extension_cls="moesim.engine.vllm.WorkerExtension")`, then
    `llm.collective_rpc("moesim_check")`."""

    def moesim_reset(self, counting: bool = False) -> None:
        """Bind requests anew and zero the counts; count from now on, or not."""
        replay = _replay()
        replay.counting = counting
        replay.reset()

    def moesim_swap(self, path: str) -> None:
        """Replay another file of the same shapes; with replicas, its maps take effect too."""
        from moesim.engine import vllm_hooks
        from moesim.engine.content import load_content

        replay = vllm_hooks.current()
        replay.swap(load_content(path))
        vllm_hooks.set_maps(self.model_runner, replay.content)  # type: ignore[attr-defined]

    def moesim_check(self) -> dict[str, Any]:
        """`Replay.check` of this worker."""
        return _replay().check()


def _replay() -> Any:
    from moesim.engine import vllm_hooks

    return vllm_hooks.current()

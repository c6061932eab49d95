"""Engines by name, and the best plan of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moesim.errors import MoesimError, UnknownNameError
from moesim.offloading.by_layer import accelerate, vllm
from moesim.offloading.ktransformers import ktransformers
from moesim.offloading.llama_cpp import ik_llama_cpp, llama_cpp
from moesim.offloading.task import EnginePlan, Task

ENGINES: Mapping[str, Callable[[Task], EnginePlan]] = {
    "llama.cpp": llama_cpp,
    "ik_llama.cpp": ik_llama_cpp,
    "KTransformers": ktransformers,
    "vLLM": vllm,
    "accelerate": accelerate,
}


def engine_name(name: str) -> str:
    """The engine's name as ENGINES has it, whatever its case. Raises UnknownNameError."""
    found = {known.casefold(): known for known in ENGINES}.get(name.casefold())
    if found is None:
        raise UnknownNameError("engine", name[:60], ENGINES)
    return found


def plan_engines(task: Task, names: tuple[str, ...] = ()) -> tuple[EnginePlan, ...]:
    """The best plan of each engine, the fastest on the task's request first; engines that cannot
    run it last, with why."""
    found = []
    for name in names or tuple(ENGINES):
        try:
            found.append(ENGINES[name](task))
        except MoesimError as error:
            found.append(EnginePlan(name, problem=error.cause))
    return tuple(sorted(found, key=lambda plan: plan.request_s(task.prompt, task.output)))

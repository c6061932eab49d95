"""Environment and command lines that start an engine on what `moesim engine replay` wrote."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

Placement = Literal["none", "renumbered", "eplb"]
STRATEGY = "moesim_replay"
"""Name of the plug-in (entry point) and of the routing strategy that it registers."""
EXTENSION = "moesim.engine.vllm.WorkerExtension"
NEVER_REBALANCE = 2_000_000_000
"""Steps between rearrangements of the engine's own balancer: more than any run has."""


def environment(replay: Path) -> dict[str, str]:
    """Variables of every process of the engine."""
    return {
        "MOESIM_REPLAY": str(replay.resolve()),
        "VLLM_PLUGINS": STRATEGY,
        "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": STRATEGY,
    }


def arguments(
    model: Path, placement: Placement, num_gpus: int, num_redundant: int
) -> dict[str, object]:
    """Engine arguments by their Python names. Every expert-parallel rank is a data-parallel rank
    with tokens of its own; one GPU has neither."""
    found: dict[str, object] = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "enable_prefix_caching": False,
        "worker_extension_cls": EXTENSION,
    }
    if num_gpus > 1:
        found["data_parallel_size"] = num_gpus
        found["enable_expert_parallel"] = True
    if placement == "eplb":
        found["enable_eplb"] = True
        found["eplb_config"] = {
            "num_redundant_experts": num_redundant,
            "step_interval": NEVER_REBALANCE,
            "use_async": False,
        }
    return found


def options(values: Mapping[str, object]) -> str:
    """Engine arguments as command-line options."""
    words = []
    for name, value in values.items():
        if name == "model":
            continue
        option = "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif value is False:
            words.append("--no-" + name.replace("_", "-"))
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            words.append(f"{option} {shlex.quote(text)}")
    return " ".join(words)


def script(replay: Path, values: Mapping[str, object]) -> str:
    """A shell script: `sh launch.sh` serves, `sh launch.sh bench latency --batch-size 64 ...` runs
    another of the engine's commands with the same model."""
    model = shlex.quote(str(values["model"]))
    lines = ["#!/bin/sh", "# Random weights and a replayed routing: times are meant, not text."]
    lines += [f"export {n}={shlex.quote(v)}" for n, v in environment(replay).items()]
    lines += [
        "if [ $# -eq 0 ]; then",
        f"  exec vllm serve {model} {options(values)}",
        "fi",
        f'exec vllm "$@" --model {model} {options(values)}',
    ]
    return "\n".join(lines) + "\n"

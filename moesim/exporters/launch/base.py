"""A service as engines are told of it, whatever engine it is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from moesim.figures import count

Files = Mapping[str, str]
PORTS = {"serving": 8300, "prefill": 8100, "decode": 8200}
FRONT = "8000"
"""Port of the router."""
WARM_PROMPTS = 100
"""Requests before a test, so that kernels are compiled and connections open."""


@dataclass(frozen=True, slots=True)
class Role:
    """`engines` engines of one role: "serving" does both, "prefill" and "decode" one each.

    tp, dp, ep, moe_tp, moe_comm, dtypes and limits as `moesim.serving.deployment.Deployment`; the
    limits are of one data-parallel rank. gpu, gpus_per_node: of the cluster. pp: pipeline stages.
    placement: file of the experts' placement, in the engine's format, "" without one; unplaced: say
    that the engine loads none.
    """

    role: Literal["serving", "prefill", "decode"]
    engines: int
    tp: int
    dp: int
    ep: int
    moe_tp: int
    moe_comm: str
    kv_dtype: str
    max_batch_tokens: int
    max_sequences: int
    memory_fraction: float
    gpus_per_node: int
    two_batch_overlap: str = "off"
    redundant_experts: int = 0
    pp: int = 1
    gpu: str = "GPU"
    placement: str = ""
    unplaced: bool = False

    @property
    def num_gpus(self) -> int:
        """GPUs of one engine."""
        return self.tp * self.dp * self.pp

    @property
    def num_nodes(self) -> int:
        """Nodes of one engine."""
        return ceil(self.num_gpus / self.gpus_per_node)

    @property
    def port(self) -> int:
        """Where engines of this role listen."""
        return PORTS[self.role]


@dataclass(frozen=True, slots=True)
class Service:
    """model: what engines call it. rate, prompt, output: requests/s and mean tokens promised for;
    seconds: how long a test of the promise runs. drafts: tokens that the model's own layers draft
    in every step, 0 without speculation."""

    model: str
    roles: Sequence[Role]
    rate: float
    prompt: float
    output: float
    num_experts: int
    drafts: int = 0
    seconds: float = 300.0

    @property
    def split(self) -> bool:
        """Whether prompts and decoding are apart."""
        return len(self.roles) > 1

    @property
    def alone(self) -> bool:
        """Whether one engine takes all requests, so that no router is needed."""
        return not self.split and self.roles[0].engines == 1

    @property
    def front(self) -> str:
        """Port that requests go to."""
        return str(self.roles[0].port) if self.alone else FRONT

    @property
    def num_prompts(self) -> int:
        """Requests of a test of the promise."""
        return max(100, round(self.rate * self.seconds))


def script(comments: Sequence[str], commands: Sequence[Sequence[str]]) -> str:
    """A shell script: comment lines, then commands with one option per line."""
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", *(f"# {line}" for line in comments)]
    lines += [" \\\n  ".join(_grouped(command)) for command in commands]
    return "\n".join(lines) + "\n"


def _grouped(words: Sequence[str]) -> list[str]:
    """Each option with its values on one line; $NAME is left to the shell."""
    out: list[str] = []
    for word in words:
        text = f'"{word}"' if word.startswith("$") else shlex.quote(word)
        if out and not word.startswith("--"):
            out[-1] += f" {text}"
        else:
            out.append(text)
    return out


def bench_script(
    service: Service,
    command: Sequence[str],
    count: str,
    seed: str,
    save: Sequence[str],
    needs: Sequence[str] = (),
) -> str:
    """The engine's benchmark: once to warm up, once more with its result saved. count, seed: its
    options of how many requests, and of their prompts, which differ from run to run so that none is
    in the engine's prefix cache. save: what writes the result. needs: the first comment, else where
    requests go."""
    first = needs or ["tests the promise" + ("" if service.alone else "; needs the router")]
    runs = [
        [*command, count, str(WARM_PROMPTS), seed, "$RANDOM"],
        [*command, count, str(service.num_prompts), seed, "$RANDOM", *save],
    ]
    return script([*first, "the first run warms up, the second counts"], runs)


def where(role: Role) -> list[str]:
    """Comment lines: on which machines a script runs."""
    lines = [f"{role.role}: {count(role.engines, 'engine')} of {role.num_gpus} x {role.gpu}"]
    if role.unplaced:
        lines.append("the engine loads no placement of experts from a file")
    if role.engines > 1:
        lines.append("run this for each of them")
    if role.num_nodes > 1:
        lines.append(
            f"an engine spans {role.num_nodes} nodes: set HEAD to the address of the first, and"
            f" NODE_RANK on each, 0 to {role.num_nodes - 1}"
        )
    elif role.num_gpus < role.gpus_per_node:
        lines.append("several engines fit a node: give each its own GPUs (CUDA_VISIBLE_DEVICES)")
    return lines


def urls(role: Role) -> list[str]:
    """Addresses of a role's engines, to be put in."""
    return [f"http://{role.role.upper()}_{i}:{role.port}" for i in range(role.engines)]

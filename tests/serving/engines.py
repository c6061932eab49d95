"""Small services for tests: a deployment whose steps take what the test says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from moesim.serving.config import ServingConfig
from moesim.serving.deployment import Deployment, deploy
from moesim.serving.engines import engine_profile
from moesim.serving.requests import Requests
from moesim.serving.result import ServingResult
from moesim.serving.run import run_tables
from moesim.serving.step_table import TERM_FIELDS, StepTables


def small_deployment(dp: int = 1, host: dict[str, Any] | None = None, **options: Any) -> Deployment:
    """OLMoE on one H100 a rank; only its limits matter where step times are given. Requests reach
    the engine at once and join the next step, unless `host` says otherwise."""
    plain = {"request_ms": 0.0, "prompt_token_us": 0.0, "steps_ahead": 0}
    engine = replace(engine_profile("vllm"), **plain | (host or {}))
    return deploy("OLMoE-1B-7B", "h100-sxm-ib", tp=1, dp=dp, engine=engine, **options)


def tables(
    step_us: float = 1000.0,
    row_us: float = 0.0,
    context_us: float = 0.0,
    pair_us: float = 0.0,
    moe_us: float = 0.0,
) -> StepTables:
    """Steps of `step_us` + of the slowest rank `row_us` a row, `context_us` a cached token that a
    decode attends to and `pair_us` a query-key pair of prompts + `moe_us` a token of all ranks."""
    x = np.array([[1.0, 2.0]])
    terms = np.zeros((1, 1, len(TERM_FIELDS)))
    terms[0, 0, TERM_FIELDS.index("num_layers")] = 1
    terms[0, 0, TERM_FIELDS.index("us_per_seen")] = context_us
    terms[0, 0, TERM_FIELDS.index("us_per_pair")] = pair_us
    terms[0, 0, TERM_FIELDS.index("sharpness")] = 2.0
    none = np.zeros((1, 2))
    return StepTables(
        x, x * row_us, x, (x * moe_us)[None], x * moe_us, x, none, terms,
        np.zeros(1), np.zeros(1), np.array([step_us]), np.zeros(1), none, none,
        np.array([[np.inf, np.inf, 0.0, 0.0, 1.0]]), np.zeros(1), none, np.zeros((1, 3)),
        np.zeros((1, 1, 2)), np.zeros(1),
    )  # fmt: skip


def serve(
    requests: Requests,
    step: StepTables,
    *,
    capacity: int = 1 << 20,
    deployment: Deployment | None = None,
    **config: Any,
) -> ServingResult:
    """Run with given step times and a KV cache of `capacity` tokens per rank."""
    chosen = small_deployment() if deployment is None else deployment
    return run_tables(
        chosen, requests, ServingConfig(**config), step, capacity_tokens=(capacity, capacity)
    )


def at_once(prompt: list[int], output: list[int], **more: Any) -> Requests:
    """Requests that all arrive at 0."""
    return Requests.of(np.zeros(len(prompt)), prompt, output, **more)

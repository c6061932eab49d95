"""The exporters by name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import cast

from moesim.errors import UnknownNameError
from moesim.exporters.base import Exporter

MODULES: Mapping[str, str] = {
    "sglang": "sglang",
    "tensorrt-llm": "tensorrt_llm",
    "vllm": "vllm",
    "vllm-pr41141": "vllm_pr41141",
    "vllm-ascend": "vllm_ascend",
    "omni-infer": "omni_infer",
    "eplb": "eplb",
    "megatron": "megatron",
}
"""Engine -> module."""


def exporter(name: str) -> Exporter:
    """The exporter called `name`. Raises UnknownNameError with the nearest name."""
    if name not in MODULES:
        raise UnknownNameError("engine", name, MODULES)
    return cast(Exporter, import_module(f"moesim.exporters.{MODULES[name]}"))

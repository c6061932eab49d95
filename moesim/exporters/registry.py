"""The exporters by name."""

from __future__ import annotations

from typing import cast

from moesim.exporters.base import Exporter
from moesim.plugins import Registry

EXPORTERS = Registry(
    "engine",
    "moesim.exporters",
    {
        "sglang": "moesim.exporters.sglang",
        "tensorrt-llm": "moesim.exporters.tensorrt_llm",
        "vllm": "moesim.exporters.vllm",
        "vllm-pr41141": "moesim.exporters.vllm_pr41141",
        "vllm-ascend": "moesim.exporters.vllm_ascend",
        "omni-infer": "moesim.exporters.omni_infer",
        "eplb": "moesim.exporters.eplb",
        "megatron": "moesim.exporters.megatron",
    },
)


def exporter(name: str) -> Exporter:
    """The exporter called `name`. Raises UnknownNameError with the nearest name."""
    return cast(Exporter, EXPORTERS.get(name))

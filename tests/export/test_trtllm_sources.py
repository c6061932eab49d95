"""TensorRT-LLM's launch files beside its sources. Run with `pytest -m engines`, with
`$MOESIM_ENGINE_SOURCES/tensorrt-llm/` holding its commands/serve.py, llmapi/llm_args.py and
serve/scripts/benchmark_serving.py; skips otherwise."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from moesim.exporters.launch import trtllm
from moesim.exporters.launch.base import Role, Service

pytestmark = pytest.mark.engines
FOLDER = Path(os.environ.get("MOESIM_ENGINE_SOURCES", "")) / "tensorrt-llm"


def source(name: str) -> str:
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"TensorRT-LLM's {name} is not in $MOESIM_ENGINE_SOURCES/tensorrt-llm")
    return path.read_text(encoding="utf-8")


def test_options_and_settings_are_known() -> None:
    """Options by name in the parsers, settings as fields of the classes of llm_args.py."""
    parsers = {"bench.sh": source("benchmark_serving.py")}
    server, settings = source("serve.py"), source("llm_args.py")
    one = {
        "tp": 1, "dp": 16, "ep": 16, "moe_tp": 1, "kv_dtype": "fp8", "max_batch_tokens": 8192,
        "max_sequences": 256, "memory_fraction": 0.9, "gpus_per_node": 8, "redundant_experts": 16,
    }  # fmt: skip
    apart = [
        Role("prefill", 2, moe_comm="deepep", **one),
        Role("decode", 1, moe_comm="deepep_ll", placement="placement.yaml", **one),
    ]
    for roles in (apart, [Role("serving", 1, moe_comm="all_gather", pp=2, **one)]):
        written = trtllm.files(Service("org/model", roles, 10.0, 1000.0, 100.0, 256, drafts=1))
        for file, text in written.items():
            if file.endswith(".sh") and file != "router.sh":
                for option in re.findall(r"--[a-z][a-z_-]*", text):
                    assert f'"{option}"' in parsers.get(file, server), (file, option)
            elif file.endswith(".yaml") and file != "disagg.yaml":
                for name in names(yaml.safe_load(text)):
                    assert re.search(rf"^    {name}: ", settings, re.MULTILINE), (file, name)


def names(settings: dict[str, object]) -> list[str]:
    """Every key, those of inner settings included."""
    out = []
    for key, value in settings.items():
        out += [key, *(names(value) if isinstance(value, dict) else [])]
    return out

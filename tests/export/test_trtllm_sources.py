"""TensorRT-LLM's launch files: beside the names of its sources in `golden/trtllm_options.yaml`, and
with `pytest -m engines` beside the sources themselves, in `$MOESIM_ENGINE_SOURCES/tensorrt-llm/`:
commands/serve.py, llmapi/llm_args.py and serve/scripts/benchmark_serving.py; skips otherwise."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from moesim.exporters.launch import trtllm
from moesim.exporters.launch.base import Role, Service

GOLDEN = Path(__file__).parents[1] / "golden" / "trtllm_options.yaml"
FOLDER = Path(os.environ.get("MOESIM_ENGINE_SOURCES", "")) / "tensorrt-llm"


def source(name: str) -> str:
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"TensorRT-LLM's {name} is not in $MOESIM_ENGINE_SOURCES/tensorrt-llm")
    return path.read_text(encoding="utf-8")


def written() -> list[tuple[str, str]]:
    """Files of a service of two roles with all that moesim says, and of one with stages."""
    one = {
        "tp": 1, "dp": 16, "ep": 16, "moe_tp": 1, "kv_dtype": "fp8", "max_batch_tokens": 8192,
        "max_sequences": 256, "memory_fraction": 0.9, "gpus_per_node": 8, "redundant_experts": 16,
    }  # fmt: skip
    apart = [
        Role("prefill", 2, moe_comm="deepep", **one),
        Role("decode", 1, moe_comm="deepep_ll", placement="placement.yaml", **one),
    ]
    together = [Role("serving", 1, moe_comm="all_gather", pp=2, **one)]
    out = []
    for roles in (apart, together):
        service = Service("org/model", roles, 10.0, 1000.0, 100.0, 256, drafts=1)
        out += list(trtllm.files(service).items())
    return [(file, text) for file, text in out if file not in ("router.sh", "disagg.yaml")]


def options(text: str) -> list[str]:
    return re.findall(r"--[a-z][a-z_-]*", text)


def test_names_and_values_are_those_of_its_sources() -> None:
    """Also: every name of the golden file is written by something, so that it has no stale ones."""
    known = yaml.safe_load(GOLDEN.read_text())
    seen: set[str] = set()
    for file, text in written():
        if file.endswith(".sh"):
            allowed = known["bench" if file == "bench.sh" else "serve"]
            assert set(options(text)) <= set(allowed), file
            seen |= set(options(text))
        else:
            check(yaml.safe_load(text), known["settings"], file)
            seen |= set(names(yaml.safe_load(text)))
    assert seen == {*known["serve"], *known["bench"], *names(known["settings"])}


def check(settings: dict[str, object], known: dict[str, object], file: str) -> None:
    for key, value in settings.items():
        assert key in known, (file, key)
        allowed = known[key]
        if isinstance(allowed, dict) and isinstance(value, dict):
            check(value, allowed, f"{file} {key}")
        elif isinstance(allowed, list):
            assert value in allowed, (file, key, value)


@pytest.mark.engines
def test_options_and_settings_are_in_the_files_given() -> None:
    """Options by name in the parsers, settings as fields of the classes of llm_args.py."""
    parsers = {"bench.sh": source("benchmark_serving.py")}
    server, settings = source("serve.py"), source("llm_args.py")
    for file, text in written():
        if file.endswith(".sh"):
            for option in options(text):
                assert f'"{option}"' in parsers.get(file, server), (file, option)
        else:
            for name in names(yaml.safe_load(text)):
                assert re.search(rf"^    {name}: ", settings, re.MULTILINE), (file, name)


def names(settings: dict[str, object]) -> list[str]:
    """Every key, those of inner settings included."""
    out = []
    for key, value in settings.items():
        out += [key, *(names(value) if isinstance(value, dict) else [])]
    return out

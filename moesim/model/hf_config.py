"""Read a Hugging Face `config.json` into a ModelSpec.

Key names and their meaning are those of the configuration and modelling files in
huggingface/transformers (src/transformers/models/, releases 4.57 and 5.x), of the engines' own
(vllm-project/vllm, sgl-project/sglang) and of the models' repositories; `hf/families.py` lists the
architectures. Nothing is executed and nothing is fetched. A key that a known architecture needs
and that is absent is an error, unless its absence has one meaning in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesim.errors import FormatError, InputError
from moesim.model.hf.keys import printable
from moesim.model.hf.reader import NESTED, Reading, read_config
from moesim.model.spec import ModelSpec

MAX_FILE_BYTES = 4 << 20


def read_hf_config(path: Path, name: str | None = None) -> Reading:
    """Read the file at `path`. Raises InputError (cannot be read) or FormatError (cannot be used).

    Without `name` the spec is called by `_name_or_path` where that is a repository id, else by the
    file's folder. An `hf_quant_config.json` beside it is read too where the file itself does not
    say how weights are stored (ModelOpt checkpoints).
    """
    config = _read_json(path)
    if path.name == "config.json":
        config = with_quantisation(config, path.with_name("hf_quant_config.json"))
    where = str(path)
    return read_config(
        config, where, name or _default_name(config, path), f"config.json at {where}"
    )


def with_quantisation(config: Mapping[str, Any], beside: Path) -> Mapping[str, Any]:
    """The config, with what ModelOpt's second file says where it says nothing itself."""
    inner = [config.get(key) for key in NESTED]
    told = any(
        isinstance(part, dict) and part.get("quantization_config") for part in (config, *inner)
    )
    if told or not beside.is_file():
        return config
    quantization = _read_json(beside).get("quantization")
    if not isinstance(quantization, dict):
        raise FormatError(f"{beside}: no object 'quantization'", "restore the file")
    return {**config, "quantization_config": {"quant_method": "modelopt", **quantization}}


def _default_name(config: Mapping[str, Any], path: Path) -> str:
    saved = config.get("_name_or_path")
    if isinstance(saved, str) and saved.count("/") == 1 and not saved.startswith(("/", ".", "~")):
        return printable(saved, 200)
    return printable(path.resolve().parent.name if path.name == "config.json" else path.stem, 200)


def _read_json(path: Path) -> Mapping[str, Any]:
    where = str(path)
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a file", "name a config.json or the folder it is in")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise FormatError(
                f"{path}: {path.stat().st_size} bytes is too long for a config.json",
                "name the model's config.json, not its weights or its tokenizer",
            )
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}", "check the path and permissions"
        ) from None
    try:
        config = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise FormatError(f"{where}: not UTF-8 text", "name the model's config.json") from None
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{where}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}",
            "the file is truncated or damaged: fetch the model's config.json again",
        ) from None
    except (ValueError, RecursionError):
        raise FormatError(
            f"{where}: JSON with a number too long or nested too deep", "check the file"
        ) from None
    if not isinstance(config, dict):
        raise FormatError(
            f"{where}: holds a {type(config).__name__}, not an object",
            "a config.json is one object of keys and values",
        )
    return config


def spec_from_config(
    config: Mapping[str, Any],
    where: str,
    name: str,
    source: str | None = None,
    note: str = "",
) -> ModelSpec:
    """ModelSpec of a parsed `config.json`; `where` begins every error message.

    Multimodal configurations are read at their `text_config` (or `language_config`, `llm_config`,
    `thinker_config.text_config`); their towers are ignored. Raises FormatError that names the key:
    missing keys all at once, wrong types, out of range, no experts, top-k above the number of
    experts, keys of an unknown architecture that speak of its layers.
    """
    return read_config(config, where, name, source or f"config.json at {where}", note).spec

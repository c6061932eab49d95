"""Model specs by name: presets for the models people serve, any Hugging Face `config.json`, or a
GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from moesim.errors import FormatError, InputError, UnknownNameError, plain
from moesim.model.attention import AttentionSpec
from moesim.model.checkpoints import Checkpoint, checkpoint
from moesim.model.dtypes import KV_BYTES, TOKEN_BYTES, WEIGHT_BYTES, bytes_per
from moesim.model.hf.reader import Reading, read_config
from moesim.model.hf_config import read_hf_config
from moesim.model.spec import ModelSpec

__all__ = [
    "KV_BYTES",
    "TOKEN_BYTES",
    "WEIGHT_BYTES",
    "AttentionSpec",
    "ModelSpec",
    "Reading",
    "bytes_per",
    "load_model",
    "load_reading",
    "preset_aliases",
    "preset_names",
]


def load_model(name_or_path: str) -> ModelSpec:
    """The spec of a preset (name or alias, any case), of one of its published checkpoints
    (`moesim.model.checkpoints`), of a `config.json` or a folder with one, or of a `.gguf` file.

    A preset wins over a file of the same name: write `./name` for the file. Raises
    UnknownNameError with the nearest known name, InputError for a path that cannot be read, and
    FormatError for a file that is not the configuration of a MoE model.
    """
    return load_reading(name_or_path).spec


def load_reading(name_or_path: str) -> Reading:
    """As `load_model`, with the keys that were read and those that were not."""
    preset = _names().get(name_or_path.casefold())
    if preset is not None:
        return _preset(preset)
    narrower = checkpoint(name_or_path)
    if narrower is not None:
        return _checkpoint(narrower)
    path = Path(name_or_path)
    try:
        if path.is_dir():
            return _from_folder(path)
        exists = path.exists()
    except (OSError, ValueError):  # too long, or a NUL character
        exists = False
    if exists:
        return _from_gguf(path) if path.suffix == ".gguf" else read_hf_config(path)
    if path.suffix in (".json", ".gguf") or name_or_path.startswith((".", "/", "~")):
        raise InputError(
            f"no such file: {name_or_path:.200}",
            "name a preset (moesim model list), a config.json, a folder with one, or a .gguf file",
        )
    raise UnknownNameError("model", name_or_path[:200], [*preset_names(), *_aliases()])


def preset_names() -> tuple[str, ...]:
    """Names of all presets, in the order of the file."""
    return tuple(_presets())


def preset_aliases(name: str) -> tuple[str, ...]:
    """Other names of a preset, among them its Hugging Face repository ids."""
    preset = _names().get(name.casefold())
    if preset is None:
        raise UnknownNameError("model", name, preset_names())
    return tuple(_presets()[preset].get("aliases", ()))


def preset_config(name: str) -> Mapping[str, Any]:
    """The Hugging Face config that a preset holds; UnknownNameError where there is none."""
    preset = _names().get(name.casefold())
    if preset is None:
        raise UnknownNameError("model", name, preset_names())
    config: Mapping[str, Any] = _presets()[preset]["config"]
    return config


def _from_folder(folder: Path) -> Reading:
    config = folder / "config.json"
    if not config.exists():
        raise InputError(f"no config.json in {folder}", "name the folder that holds the model")
    return read_hf_config(config)


def _from_gguf(path: Path) -> Reading:
    from moesim.model.gguf import read_gguf
    from moesim.model.gguf_spec import spec_of

    file = read_gguf(path)
    spec, _, read = spec_of(file)
    left = tuple(key for key in file.metadata if key not in read)
    return Reading(spec, read, harmless=tuple(map(plain, left)))


@cache
def _presets() -> Mapping[str, Mapping[str, Any]]:
    import yaml

    text = resources.files("moesim").joinpath("presets/models.yaml").read_text("utf-8")
    presets: dict[str, dict[str, Any]] = yaml.safe_load(text)
    for name, preset in presets.items():
        if "base" in preset:
            preset["config"] = {**presets[preset["base"]]["config"], **preset["config"]}
        if "source" not in preset:
            raise FormatError(
                f"preset {name!r} has no source", "every preset says where it is from"
            )
    return presets


@cache
def _names() -> Mapping[str, str]:
    names: dict[str, str] = {}
    for name, preset in _presets().items():
        for known in (name, *preset.get("aliases", ())):
            if names.setdefault(known.casefold(), name) != name:
                raise FormatError(f"two presets are called {known!r}", "give them other aliases")
    return names


def _aliases() -> list[str]:
    return [alias for name in preset_names() for alias in preset_aliases(name)]


def _checkpoint(narrower: Checkpoint) -> Reading:
    found = _preset(narrower.base)
    spec = replace(
        found.spec,
        name=narrower.short,
        source=f"Hugging Face {narrower.name} config.json",
        expert_dtype=narrower.expert_dtype,
        dense_dtype=narrower.dense_dtype,
        stored=narrower.stored,
    )
    return replace(found, spec=spec)


@cache
def _preset(name: str) -> Reading:
    preset = _presets()[name]
    return read_config(
        preset["config"],
        where=f"preset {name}",
        name=name,
        source=preset["source"],
        note=preset.get("note", ""),
    )

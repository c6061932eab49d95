"""All layers of a model put together: softmax layers for time models, and every layer by kind."""

from __future__ import annotations

from moesim.model.attention import AttentionSpec, LayerKind
from moesim.model.hf.keys import Keys
from moesim.model.hf.layers import Layers
from moesim.model.hf.mixers import Mixer
from moesim.model.hf.shape import Shape


def attention_spec(layers: Layers, sizes: Shape, keys: Keys) -> AttentionSpec:
    """Softmax layers for the time models, and all layers by kind where those do not say all."""
    mixers = layers.mixers
    full = [mixer for mixer in mixers if mixer is not None and mixer.role == "full"]
    softmax = full or [mixer for mixer in mixers if mixer is not None and mixer.role == "window"]
    if not softmax:
        raise keys.error("no layer has softmax attention", "docs/models.md lists what is read")
    windowed = _ids(mixers, "window")
    linear = [mixer for mixer in mixers if mixer is not None and mixer.role == "linear"]
    spec = AttentionSpec(
        **softmax[0].softmax,
        window_tokens=max((m.window for m in mixers if m and m.role == "window"), default=0),
        window_layer_ids=windowed,
        linear_layer_ids=_ids(mixers, "linear"),
        linear_layer_params=linear[0].params if linear else 0,
        absent_layer_ids=tuple(layer for layer, mixer in enumerate(mixers) if mixer is None),
        index_layer_ids=tuple(
            i for i, m in enumerate(mixers) if m and m.softmax.get("chosen_keys")
        ),
        note="; ".join(note for note in layers.notes if "chunked" in note or "sparse" in note),
    )
    kinds = _kinds(mixers)
    plain = spec.layer_kinds(sizes.layers, sizes.hidden)
    if [_sizes_of(kind) for kind in kinds] == [_sizes_of(kind) for kind in plain]:
        return spec
    fields = {name: getattr(spec, name) for name in AttentionSpec.__dataclass_fields__}
    return AttentionSpec(**{**fields, "kinds": kinds})


def _ids(mixers: list[Mixer | None], role: str) -> tuple[int, ...]:
    return tuple(i for i, mixer in enumerate(mixers) if mixer is not None and mixer.role == role)


def _kinds(mixers: list[Mixer | None]) -> tuple[LayerKind, ...]:
    groups: dict[Mixer, list[int]] = {}
    for layer, mixer in enumerate(mixers):
        if mixer is not None:
            groups.setdefault(mixer, []).append(layer)
    order = {"full": 0, "window": 1, "linear": 2}
    kinds = [
        (
            order[mixer.role],
            LayerKind(mixer.name, tuple(ids), mixer.params, mixer.caches, mixer.state_bytes),
        )
        for mixer, ids in groups.items()
    ]
    return tuple(kind for _, kind in sorted(kinds, key=lambda entry: entry[0]))


def _sizes_of(kind: LayerKind) -> tuple[object, ...]:
    return kind.layer_ids, kind.params, kind.caches, kind.state_bytes

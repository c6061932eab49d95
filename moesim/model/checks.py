"""Checks of the numbers in a model's description."""

from __future__ import annotations

from moesim.errors import FormatError

MAX_LAYERS = 4096
MAX_EXPERTS = 32767
MAX_SIZE = 1 << 24
"""Upper limits of layer count, expert count (trace ids are int16 at the smallest) and any width."""
MAX_PARAMS = 1 << 50


def check_int(owner: str, field: str, value: object, low: int, high: int) -> None:
    """FormatError that names the field unless `value` is a whole number in low..high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise FormatError(
            f"{owner}: {field} is {type(value).__name__} {value!r:.60}, not a whole number",
            f"give {field} as an integer from {low} to {high}",
        )
    if not low <= value <= high:
        shown = str(value) if abs(value) < 10**20 else "a number of over 20 digits"
        raise FormatError(
            f"{owner}: {field} is {shown}, outside {low} to {high}",
            f"give {field} as an integer from {low} to {high}",
        )


def check_layer_ids(owner: str, field: str, ids: object, num_layers: int) -> None:
    """FormatError that names the field unless `ids` is an increasing tuple of layers."""
    if not isinstance(ids, tuple):
        raise FormatError(f"{owner}: {field} is not a tuple", f"give {field} as a tuple of layers")
    previous = -1
    for layer in ids:
        check_int(owner, field, layer, 0, num_layers - 1)
        if layer <= previous:
            raise FormatError(
                f"{owner}: {field} is not strictly increasing at layer {layer}",
                f"list every layer of {field} once, in order",
            )
        previous = layer

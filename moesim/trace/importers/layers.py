"""Which rows of a record are which layers.

A number of rows that equals a number of layers is no proof: a model of 46 layers with 45 MoE layers
and one multi-token-prediction (MTP) layer records 46 rows both ways. So rows are thrown away as
dense layers only if they are empty, and MoE layers without any load are named.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moesim.errors import FormatError, MismatchError
from moesim.trace.importers.base import ImportOptions

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
_NAME_MODEL = "name the model that was recorded with `model`, or its MoE layers with `layer_ids`"


def select_layers(
    num_rows: int, empty: BoolArray, options: ImportOptions, where: str, *, moe_only: bool = False
) -> tuple[IntArray, tuple[int, ...]]:
    """(rows that are MoE layers, their absolute numbers).

    empty: [num_rows], rows that hold nothing but padding. moe_only: the source has a row for each
    MoE layer, then one for each MTP layer, and none for dense layers. Without it, rows may be all
    hidden layers too. MTP rows are left out with a notice.
    Raises MismatchError when the rows do not fit the model, or a row that the model says is dense
    holds routing; FormatError when no row holds any.
    """
    if bool(empty.all()):
        raise FormatError(f"{where}: no layer routes to any expert", EMPTY_RECORD)
    known = options.layer_ids
    if known is None:
        return _unknown(num_rows, empty, options, moe_only)
    forms = _forms(num_rows, known, options, moe_only)
    rows = next((form for form in forms if empty[_skipped(form)].all()), None)
    if rows is None and forms:
        rows = forms[0]
    if rows is None:
        total = options.num_hidden_layers
        raise MismatchError(
            f"{where}: records {num_rows} layers, but the model has {len(known)} MoE layers"
            + (f" of {total}" if total is not None else ""),
            _NAME_MODEL,
        )
    after = int(rows[-1]) + 1
    skipped = _skipped(rows)
    full = skipped[~empty[skipped]]
    if len(full):
        raise MismatchError(
            f"{where}: row {int(full[0])} of {num_rows} holds routing, but layer {int(full[0])} of"
            " the model is dense, so the rows are not the model's layers",
            _NAME_MODEL,
        )
    if after < num_rows:
        options.notify(
            f"left out the last {num_rows - after} of {num_rows} rows: more than the model's"
            f" layers, so they are multi-token-prediction (MTP) layers"
        )
    name_empty([known[i] for i in np.flatnonzero(empty[rows])], options)
    return rows, known


def name_empty(layers: list[int], options: ImportOptions) -> None:
    """A notice for MoE layers that are kept although nothing was recorded in them."""
    if layers:
        options.notify(
            f"layers {_listed(layers)} are MoE layers, but hold no choice of any token: kept"
            " without load. Engines do not record layers that route by token id (hash); figures"
            f" leave them out{_many(len(layers), len(options.layer_ids or layers))}"
        )


def file_layers(layers: tuple[int, ...], options: ImportOptions, where: str) -> None:
    """Raise MismatchError where a file's own layer numbers are not among the model's."""
    known = options.layer_ids
    other = [layer for layer in layers if known is not None and layer not in known]
    if known is not None and other:
        raise MismatchError(
            f"{where}: has layers {_listed(other)}, which are no MoE layers of the model"
            f" ({known[0]} to {known[-1]})",
            _NAME_MODEL,
        )


def _forms(
    num_rows: int, known: tuple[int, ...], options: ImportOptions, moe_only: bool
) -> list[IntArray]:
    """Rows of the layers `known` in each form that the number of rows fits: rows of MoE layers,
    rows of all hidden layers, and rows of MoE layers with MTP rows after them."""
    total, count = options.num_hidden_layers, len(known)
    extra = 1 if options.num_mtp_layers is None else options.num_mtp_layers
    hidden = num_rows > max(known) if total is None else total <= num_rows <= total + extra
    out = [np.arange(count)] if num_rows == count else []
    if hidden and not moe_only:
        out.append(np.array(known, np.int64))
    if count < num_rows <= count + extra:
        out.append(np.arange(count))
    return out


def _skipped(rows: IntArray) -> IntArray:
    """Rows before the last of `rows` that are not among them."""
    return np.setdiff1d(np.arange(int(rows[-1]) + 1), rows)


def _unknown(
    num_rows: int, empty: BoolArray, options: ImportOptions, moe_only: bool
) -> tuple[IntArray, tuple[int, ...]]:
    total = options.num_hidden_layers
    if moe_only:
        name_empty(np.flatnonzero(empty).tolist(), options)
        options.notify(
            "layers are numbered from 0, MTP layers with them if there are any; `model` gives their"
            " real numbers"
        )
        return np.arange(num_rows), tuple(range(num_rows))
    rows = np.flatnonzero(~empty)
    if len(rows) < num_rows:
        options.notify(
            f"left out {num_rows - len(rows)} of {num_rows} layers that hold only padding"
            f" ({_listed(np.flatnonzero(empty).tolist())}): dense layers, or layers that route by"
            " token id (hash), which engines do not record; `model` tells which"
            f"{_many(num_rows - len(rows), num_rows)}"
        )
    elif total is None or total != num_rows:
        options.notify(f"layers are numbered 0..{num_rows - 1}; `model` gives their real numbers")
    return rows, tuple(int(x) for x in rows)


def _many(empty: int, total: int) -> str:
    """What more than half of the layers without load may mean."""
    if 2 * empty <= total:
        return ""
    return f". {empty} of {total} are so many that the recorder may have filled the wrong rows"


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers[:6])) + (", ..." if len(layers) > 6 else "")


EMPTY_RECORD = (
    "the engine returned an empty buffer: check that its version, model and backend fill it"
    " (docs/engines.md)"
)

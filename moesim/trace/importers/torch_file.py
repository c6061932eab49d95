"""Reading `.pt` files. The only importer module that imports torch.

`torch.load` is called with `weights_only=True` and nothing else: plain containers, numbers, text
and tensors come out, and a file that would run code is refused. Tensors are handed on as numpy
arrays, so that no other importer needs torch.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from moesim.errors import FormatError, InputError

MAX_DEPTH = 32


def load_pt(path: Path) -> Any:
    """The content of a `.pt` file, tensors as numpy arrays (bfloat16 as float32).

    Raises InputError without torch or without the file, FormatError when it is damaged or holds
    anything but tensors and plain data.
    """
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path}: reading .pt files needs torch", "install it: pip install 'moesim[torch]'"
        ) from None
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "check the path") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        unsafe = "weights" in reason.lower() or "global" in reason.lower()
        raise FormatError(
            f"{path}: holds objects other than tensors, which are never loaded"
            if unsafe
            else f"{path}: not a readable .pt file ({reason:.200})",
            "write it with torch.save from tensors, lists, dicts and numbers only",
        ) from None
    return _plain(content, str(path), 0)


def _plain(value: Any, where: str, depth: int) -> Any:
    import torch

    if depth > MAX_DEPTH:
        raise FormatError(f"{where}: nested more than {MAX_DEPTH} deep", "the file is not a dump")
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            raise FormatError(f"{where}: holds a sparse or quantized tensor", "save dense tensors")
        dense = value.detach()
        if dense.dtype == torch.bfloat16:
            dense = dense.float()
        try:
            return dense.contiguous().numpy()
        except (TypeError, RuntimeError):
            raise FormatError(
                f"{where}: holds a tensor of type {dense.dtype}", "save integers or plain floats"
            ) from None
    if isinstance(value, dict):
        return {key: _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    return value

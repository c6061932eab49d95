"""A Hugging Face model to capture from: loading it, and telling its weights from others."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import torch
import transformers

from moesim.errors import InputError


def load(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    """The model, in evaluation mode on its device, and its tokenizer.

    name: folder or hub id; device, dtype: see `CaptureOptions`.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        kind: Any = (
            transformers.AutoModelForSeq2SeqLM
            if config.is_encoder_decoder
            else transformers.AutoModelForCausalLM
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = kind.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            **({"device_map": device} if device == "balanced" else {}),
        )
        if device != "balanced":
            model.to(device)
    except torch.OutOfMemoryError:
        raise InputError(
            f"{name} does not fit on {device}",
            "use `device` balanced or a smaller `dtype`",
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        cause = str(error).strip().partition("\n")[0][:200]
        raise InputError(
            f"cannot load {name}: {cause}",
            "name a folder or hub id with config.json, safetensors weights and a tokenizer",
        ) from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(
            f"{name} has no tokenizer", "put tokenizer.json beside the model's config.json"
        )
    model.eval()
    return model, tokenizer


def weights_digest(model: Any) -> str:
    """A hash over a few values of every parameter, to tell checkpoints apart."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().reshape(-1)[:: max(1, parameter.numel() // 8)]
        digest.update(f"{name}:{tuple(parameter.shape)}:{values.cpu().tolist()}".encode())
    return digest.hexdigest()

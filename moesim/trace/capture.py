"""Capture routing traces from Hugging Face transformers models.

Prompts go through `generate` batch by batch: the prompt's tokens are recorded as prefill, the
tokens that the model then writes as decode. Each finished batch is noted down in a journal folder
beside the output, so that memory holds one batch and a capture that was stopped goes on where it
was; sampling is seeded by batch, so that the result is the same.

Ignored: padding; the last token that a request generates, which never passes the model; what other
modalities than text would route. The choices of a token are in the router's order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from moesim.errors import InputError
from moesim.trace.candidates import NAMES
from moesim.trace.capture_candidates import CandidateRecorder
from moesim.trace.capture_hooks import RoutingRecorder
from moesim.trace.capture_journal import Journal
from moesim.trace.capture_model import load, weights_digest
from moesim.trace.format import DECODE, PREFILL, TraceMeta
from moesim.trace.prompts import NO_DOMAIN, PromptFile, iter_prompts, scan_prompts
from moesim.types import Array

WINDOW_BATCHES = 16
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """What to capture, and how.

    model: folder or hub id, loaded from safetensors only and without running code of its own.
    max_new_tokens: decode tokens recorded for each request, fewer where the model ends its text.
    max_prompt_tokens: longer prompts are cut to their first so many tokens.
    temperature: of sampling; 0 takes the likeliest token.
    dtype: of the weights; auto is the checkpoint's. device: auto, cpu, cuda:N, or balanced (all
    GPUs; needs accelerate).
    gate_weights: store them, as float16. candidates: experts of each router to store with their
    scores, 0 for none; more than the top-k.
    chat: wrap each prompt as a user's message in the tokenizer's chat template.
    """

    model: str
    prompts: Path
    out: Path
    max_new_tokens: int = 0
    batch_size: int = 8
    max_prompt_tokens: int = 2048
    temperature: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    gate_weights: bool = True
    candidates: int = 0
    chat: bool = False
    name: str = ""
    license: str = ""

    def check(self) -> None:
        """Raise InputError for values that cannot be used."""
        for name, value, least in (
            ("max-new-tokens", self.max_new_tokens, 0),
            ("batch-size", self.batch_size, 1),
            ("max-prompt-tokens", self.max_prompt_tokens, 1),
            ("seed", self.seed, 0),
            ("candidates", self.candidates, 0),
        ):
            if not least <= value < 1 << 31:
                raise InputError(f"--{name} {value}", f"give a whole number from {least}")
        if not 0 <= self.temperature <= 100:
            raise InputError(f"`temperature` {self.temperature}", "give a number from 0 to 100")
        if self.dtype not in DTYPES:
            raise InputError(f"`dtype` {self.dtype!r:.40}", "choose " + ", ".join(DTYPES))
        if self.out.suffix != ".npz" and self.out.exists():
            raise InputError(f"{self.out} exists already", "name a new directory, or an .npz file")
        if not self.out.absolute().parent.is_dir():
            raise InputError(
                f"cannot write {self.out}: there is no folder {self.out.parent}",
                "name a file in a folder that exists",
            )


@dataclass(frozen=True, slots=True)
class CaptureResult:
    """What was written; `num_resumed` of the `num_batches` were in the journal already."""

    meta: TraceMeta
    num_requests: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_batches: int
    num_resumed: int


@dataclass(frozen=True, slots=True)
class _Request:
    number: int
    token_ids: list[int]
    domain: str


def capture(
    options: CaptureOptions,
    notify: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> CaptureResult:
    """Capture `options.prompts` on `options.model` into the trace `options.out`.

    A request is a prompt, numbered from 0 in the order of the file. Memory is one batch and one
    window of WINDOW_BATCHES batches of prompts, which are sorted by length to save padding.
    progress: called with (prompts done, prompts). notify: called with lines for the user.

    Raises InputError for a model, prompts or output that cannot be used, MismatchError when the
    journal is that of another capture.
    """
    options.check()
    prompts = scan_prompts(options.prompts)
    model, tokenizer = load(options.model, options.device, options.dtype)
    run = _Run(model, tokenizer, prompts, options)
    done = num_batches = 0
    with RoutingRecorder(model) as recorder, run.record_candidates(recorder):
        journal = Journal(options.out, run.inputs(recorder))
        if journal.num_found:
            notify(f"{journal.folder} holds {journal.num_found} finished batches: going on there")
        with journal.kept_if_begun():
            for batch_idx, batch in enumerate(run.batches()):
                if batch_idx >= journal.num_found:
                    journal.add(batch_idx, run.route(recorder, batch_idx, batch))
                done, num_batches = done + len(batch), batch_idx + 1
                if progress is not None:
                    progress(done, prompts.num_prompts)
        if run.num_cut:
            notify(f"{run.num_cut} prompts were cut to {run.max_prompt_tokens} tokens")
        top_k = journal.read(0)["expert_ids"].shape[2]
        meta = run.meta(recorder, top_k)
    journal.write_trace(options.out, meta, num_batches)
    num_tokens = [0, 0]
    for batch_idx in range(num_batches):
        num_tokens += np.bincount(journal.read(batch_idx)["phases"], minlength=2)
    journal.discard()
    return CaptureResult(
        meta, done, int(num_tokens[0]), int(num_tokens[1]), num_batches, journal.num_found
    )


class _Run:
    """A loaded model with what to run through it."""

    def __init__(
        self, model: Any, tokenizer: Any, prompts: PromptFile, options: CaptureOptions
    ) -> None:
        self.model, self.tokenizer, self.prompts, self.options = model, tokenizer, prompts, options
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        eos = model.generation_config.eos_token_id
        self.end_ids = [eos] if isinstance(eos, int) else list(eos or ())
        pad = tokenizer.pad_token_id
        self.pad_id = int(pad if pad is not None else self.end_ids[0] if self.end_ids else 0)
        self.domain_idx = {name: i for i, name in enumerate(prompts.domains)}
        text_config = model.config.get_text_config()
        room = getattr(text_config, "max_position_embeddings", None) or 1 << 30
        if not self.encoder_decoder:
            room -= options.max_new_tokens
        if room < 1:
            raise InputError(
                f"`max_new_tokens` {options.max_new_tokens} leaves no room for a prompt",
                f"the model has {room + options.max_new_tokens} positions",
            )
        self.max_prompt_tokens = min(options.max_prompt_tokens, room)
        self.num_cut = 0
        self.candidates: CandidateRecorder | None = None

    def record_candidates(self, recorder: RoutingRecorder) -> AbstractContextManager[Any]:
        """Hooks on the routers while the block runs, if candidates were asked for."""
        if not self.options.candidates:
            return nullcontext()
        self.candidates = CandidateRecorder(self.model, recorder.layers, self.options.candidates)
        return self.candidates

    def inputs(self, recorder: RoutingRecorder) -> dict[str, Any]:
        """What the result depends on, for the journal."""
        config = self.model.config.to_json_string(use_diff=False)
        chosen = {k: v for k, v in asdict(self.options).items() if k not in ("prompts", "out")}
        return {
            **chosen,
            "prompts": self.prompts.sha256,
            "config": hashlib.sha256(config.encode()).hexdigest(),
            "weights": weights_digest(self.model),
            "layers": [layer.name for layer in recorder.layers],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def batches(self) -> Iterator[list[_Request]]:
        """The requests, batch by batch; the longest of a window of prompts come first."""
        size = self.options.batch_size
        numbered = enumerate(iter_prompts(self.prompts.path))
        while window := list(islice(numbered, size * WINDOW_BATCHES)):
            requests = [
                _Request(number, self.encode(number, prompt.text), prompt.domain)
                for number, prompt in window
            ]
            requests.sort(key=lambda request: -len(request.token_ids))
            for start in range(0, len(requests), size):
                yield requests[start : start + size]

    def encode(self, number: int, text: str) -> list[int]:
        """Token ids of a prompt, cut to `max_prompt_tokens`."""
        if self.options.chat:
            message = [{"role": "user", "content": text}]
            try:
                text = self.tokenizer.apply_chat_template(
                    message, tokenize=False, add_generation_prompt=True
                )
            except (ValueError, TypeError) as error:
                raise InputError(f"no chat template: {error}", "leave `chat` out") from None
        ids: list[int] = self.tokenizer(text, add_special_tokens=not self.options.chat)["input_ids"]
        if not ids:
            raise InputError(
                f"{self.prompts.path}: prompt {number} has no tokens", "leave that prompt out"
            )
        self.num_cut += len(ids) > self.max_prompt_tokens
        return ids[: self.max_prompt_tokens]

    def route(
        self, recorder: RoutingRecorder, batch_idx: int, batch: list[_Request]
    ) -> dict[str, Array]:
        """Run a batch through the model; the arrays of its tokens, request by request."""
        seed = np.random.SeedSequence([self.options.seed, batch_idx]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        lengths = [len(request.token_ids) for request in batch]
        width = max(lengths)
        input_ids = torch.full((len(batch), width), self.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        starts = [0 if self.encoder_decoder else width - length for length in lengths]
        for row, (request, start) in enumerate(zip(batch, starts, strict=True)):
            part = slice(start, start + lengths[row])
            input_ids[row, part] = torch.tensor(request.token_ids)
            mask[row, part] = 1
        output = self.generate(input_ids, mask)
        written = output if self.encoder_decoder else output[:, width:]
        fed = written[:, :-1]
        prompt_rows, steps = len(batch) * width, fed.shape[1]
        if self.encoder_decoder:
            first = recorder.take(prompt_rows, in_encoder=True)
            later = recorder.take(len(batch) * steps)
        else:
            ids, weights = recorder.take(prompt_rows + len(batch) * steps)
            first = ids[:prompt_rows], weights[:prompt_rows]
            later = ids[prompt_rows:], weights[prompt_rows:]
        listed = self.listed(prompt_rows + len(batch) * steps, later[0].shape[2])
        parts: list[dict[str, Array]] = []
        phases = np.array([PREFILL, DECODE], np.uint8)
        for row, request in enumerate(batch):
            prompt = row * width + starts[row] + np.arange(lengths[row])
            decoded = self.num_decoded(fed[row])
            decode = np.arange(decoded) * len(batch) + row
            total = lengths[row] + decoded
            parts.append(
                {
                    "expert_ids": np.concatenate([first[0][prompt], later[0][decode]]),
                    "gate_weights": np.concatenate([first[1][prompt], later[1][decode]]).astype(
                        np.float16
                    ),
                    "request_ids": np.full(total, request.number, np.int32),
                    "positions": np.arange(total, dtype=np.int32),
                    "phases": np.repeat(phases, [lengths[row], decoded]),
                    "token_ids": np.array([*request.token_ids, *fed[row, :decoded]], np.int32),
                    "domain_ids": np.full(
                        total, self.domain_idx.get(request.domain or NO_DOMAIN, 0), np.int16
                    ),
                    **{n: a[np.concatenate([prompt, prompt_rows + decode])] for n, a in listed},
                }
            )
        left_out = set() if self.options.gate_weights else {"gate_weights"}
        if not self.prompts.domains:
            left_out.add("domain_ids")
        return {
            name: np.concatenate([part[name] for part in parts])
            for name in parts[0]
            if name not in left_out
        }

    def listed(self, num_rows: int, top_k: int) -> list[tuple[str, Array]]:
        """Names and arrays of the candidates since the last batch, rows as the choices'; none
        where none are recorded."""
        if self.candidates is None:
            return []
        if self.candidates.num_candidates <= top_k:
            raise InputError(
                f"`candidates` {self.candidates.num_candidates}, but a token chooses {top_k}",
                f"give {top_k + 1} or more",
            )
        return list(zip(NAMES, self.candidates.take(num_rows), strict=True))

    def num_decoded(self, fed: Array) -> int:
        """Decode tokens of a request: up to the end of its text, at most `max_new_tokens`.

        fed: tokens that passed the decoder, one a step, those after the end included. The first of
        an encoder-decoder model is the start token, which may be the end token as well.
        """
        first = 1 if self.encoder_decoder else 0
        ends = np.flatnonzero(np.isin(fed[first:], self.end_ids))
        length = first + int(ends[0]) if len(ends) else len(fed)
        return min(length, self.options.max_new_tokens)

    def generate(self, input_ids: torch.Tensor, mask: torch.Tensor) -> Array:
        """Tokens [requests, prompt + new], or [requests, start + new] of an encoder-decoder."""
        extra = 0 if self.encoder_decoder and self.options.max_new_tokens else 1
        sampling = self.options.temperature > 0
        config = transformers.GenerationConfig(
            max_new_tokens=self.options.max_new_tokens + extra,
            do_sample=sampling,
            temperature=self.options.temperature if sampling else None,
            top_k=0 if sampling else None,
            top_p=1.0 if sampling else None,
            num_beams=1,
            pad_token_id=self.pad_id,
            eos_token_id=self.end_ids or None,
            use_cache=True,
        )
        device = self.model.device
        try:
            with torch.inference_mode():
                output = self.model.generate(
                    input_ids=input_ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=config,
                )
        except torch.OutOfMemoryError:
            raise InputError(
                f"out of GPU memory with {len(input_ids)} prompts of {input_ids.shape[1]} tokens",
                "lower `batch_size` or `max_prompt_tokens`",
            ) from None
        tokens: Array = output.cpu().numpy()
        return tokens

    def meta(self, recorder: RoutingRecorder, top_k: int) -> TraceMeta:
        """The trace's description of itself."""
        options = self.options
        return TraceMeta(
            model=options.name or Path(options.model).name,
            num_experts=recorder.num_experts,
            top_k=top_k,
            layer_ids=tuple(layer.layer_id for layer in recorder.layers),
            domains=self.prompts.domains,
            license=options.license,
            source={
                "kind": "captured",
                "tool": f"transformers {transformers.__version__}, torch {torch.__version__}",
                "architecture": type(self.model).__name__,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "device": self.model.device.type,
                "prompts_sha256": self.prompts.sha256,
                "num_requests": self.prompts.num_prompts,
                "max_prompt_tokens": self.max_prompt_tokens,
                "max_new_tokens": options.max_new_tokens,
                "batch_size": options.batch_size,
                "temperature": options.temperature,
                "seed": options.seed,
                "chat": options.chat,
            },
        )

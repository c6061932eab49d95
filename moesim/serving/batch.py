"""What one forward step of an engine computes: tokens and attended context of every DP rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError
from moesim.types import FloatArray

_FIELDS = ("decode_tokens", "decode_context_tokens", "prefill_tokens", "prefill_pairs")


@dataclass(frozen=True, slots=True, eq=False)
class BatchShape:
    """One step, or many: every array is `[..., D]`, D data-parallel attention ranks.

    decode_tokens: sequences that produce one token (rows of the step).
    decode_context_tokens: cached tokens they attend to, summed over the sequences.
    prefill_tokens: new prompt tokens (rows), of whole prompts or of chunks.
    prefill_pairs: query-key pairs of those, summed: a chunk of n tokens after p cached ones has
    n p + n (n + 1) / 2 (`chunk_pairs`).
    prefill_sequences: chunks or prompts among them; by default 1 where there are prompt tokens.

    Construct with `BatchShape.of`, which broadcasts and checks. Lengths within a rank are taken as
    equal where a kernel's time is not linear in them.
    """

    decode_tokens: FloatArray
    decode_context_tokens: FloatArray
    prefill_tokens: FloatArray
    prefill_pairs: FloatArray
    prefill_sequences: FloatArray

    @classmethod
    def of(
        cls,
        decode_tokens: npt.ArrayLike = 0.0,
        decode_context_tokens: npt.ArrayLike = 0.0,
        prefill_tokens: npt.ArrayLike = 0.0,
        prefill_pairs: npt.ArrayLike | None = None,
        prefill_sequences: npt.ArrayLike | None = None,
    ) -> BatchShape:
        """From arrays that broadcast to `[..., D]`; a scalar is one step of one rank.

        `prefill_pairs` defaults to the pairs of one whole prompt a rank. Raises InputError for
        negative or infinite numbers, tokens without pairs and context without tokens.
        """
        prompt = np.asarray(prefill_tokens, dtype=np.float64)
        pairs = chunk_pairs(prompt) if prefill_pairs is None else prefill_pairs
        count = (prompt > 0) * 1.0 if prefill_sequences is None else prefill_sequences
        given = (decode_tokens, decode_context_tokens, prompt, pairs, count)
        arrays: list[FloatArray] = list(
            np.broadcast_arrays(*(np.atleast_1d(np.asarray(a, np.float64)) for a in given))
        )
        for name, array in zip((*_FIELDS, "prefill_sequences"), arrays, strict=True):
            if not np.all(np.isfinite(array)) or np.any(array < 0):
                raise InputError(
                    f"{name} of a batch holds a negative or infinite number",
                    "give counts of 0 or more",
                )
        decode, context, prompt, pairs, count = arrays
        if np.any((context > 0) & (decode == 0)) or np.any((pairs > 0) != (prompt > 0)):
            raise InputError(
                "a batch has context without sequences, or prompt tokens without pairs",
                "give decode_tokens with decode_context_tokens, prefill_tokens with prefill_pairs",
            )
        return cls(decode, context, prompt, pairs, count)

    @property
    def num_ranks(self) -> int:
        """D, the data-parallel attention ranks."""
        return int(self.decode_tokens.shape[-1])

    def cut(self, parts: int) -> BatchShape:
        """One of so many equal parts of every count."""
        names = (*_FIELDS, "prefill_sequences")
        return BatchShape(*(getattr(self, name) / parts for name in names))

    @property
    def rows(self) -> FloatArray:
        """`[..., D]`: tokens that every rank feeds through its layers."""
        return self.decode_tokens + self.prefill_tokens


def chunk_pairs(new_tokens: npt.ArrayLike, cached_tokens: npt.ArrayLike = 0.0) -> FloatArray:
    """Query-key pairs of a chunk: n p + n (n + 1) / 2 for n new tokens after p cached ones."""
    n = np.asarray(new_tokens, dtype=np.float64)
    return np.asarray(n * np.asarray(cached_tokens) + n * (n + 1) / 2, dtype=np.float64)

"""What calibration sections get: what to measure, with what, and where rows go."""

from __future__ import annotations

from dataclasses import dataclass, field

from moesim.replay.measure import Recorder
from moesim.replay.ops import Kernels
from moesim.replay.process import Context
from moesim.replay.shape import ExpertShape

DEFAULT_SHAPES = (
    ExpertShape("mixtral-8x7b", 4096, 14336, 8, 2),
    ExpertShape("olmoe-1b-7b", 2048, 1024, 64, 8),
    ExpertShape("qwen3-30b-a3b", 2048, 768, 128, 8),
    ExpertShape("gpt-oss-20b", 2880, 2880, 32, 4),
    ExpertShape("deepseek-v2-lite", 2048, 1408, 64, 6),
)


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """What to measure.

    shapes: experts, replayed at their real sizes. max_tokens_per_rank: FFN and permutation cases go
    up to what a batch of so many tokens per rank brings. ffn_rows: mean rows per slot of the FFN
    cases instead of the built-in ones. max_bytes: largest collective and copy.
    budget_s: timing of one case. sections: empty for all.
    """

    shapes: tuple[ExpertShape, ...] = DEFAULT_SHAPES
    max_tokens_per_rank: int = 8192
    max_bytes: int = 512 << 20
    budget_s: float = 0.06
    time_limit_s: float = 240.0
    sections: tuple[str, ...] = ()
    ffn: str = "auto"
    graphs: bool = True
    ffn_rows: tuple[float, ...] = ()


@dataclass
class Session:
    """What a section gets: the ranks, the kernels, the clock's limit, and where rows go."""

    ctx: Context
    options: CalibrateOptions
    kernels: Kernels
    recorder: Recorder
    notes: list[str] = field(default_factory=list)

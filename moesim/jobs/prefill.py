"""`prefill`: one long prompt over many GPUs, by schedule of its attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moesim.errors import InfeasibleError, InputError
from moesim.figures import text_table
from moesim.jobs import inputs
from moesim.jobs.result import Result
from moesim.serving.deployment import Deployment, deploy
from moesim.serving.memory import gpu_memory
from moesim.serving.ring import PromptTime, prompt_us
from moesim.serving.step_cost import EngineStepCost

if TYPE_CHECKING:
    import pandas as pd

    from moesim.jobs.inputs import ClusterLike, ModelLike

MAX_TOKENS = 1 << 26


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PrefillResult(Result):
    """deployment, tokens: what of; times: by schedule; basis: the weakest of their parts."""

    deployment: Deployment
    tokens: int
    times: dict[str, PromptTime]
    basis: str

    @property
    def best(self) -> str:
        """The schedule that takes least."""
        return min(self.times, key=lambda name: self.times[name].total_us)

    def line(self) -> str:
        d, best = self.deployment, self.best
        return (
            f"{d.model.name}, a prompt of {self.tokens:,} tokens on {d.num_gpus} x {d.gpu.name}:"
            f" {best}, {self.times[best].total_us / 1e3:,.1f} ms"
        )

    def summary(self) -> str:
        whole = self.times["one rank"].total_us
        rows = [
            [
                name,
                *(f"{us / 1e3:,.1f}" for us in (t.total_us, t.attention_us, t.exposed_us)),
                f"{t.other_us / 1e3:,.1f}",
                f"{whole / t.total_us:.2f}x",
            ]
            for name, t in self.times.items()
        ]
        head = ["ms", "prompt", "attention", "waiting", "all else", "as fast"]
        table = text_table(head, rows)
        return f"{self.line()}\n{table}\nbasis: {self.basis} at the weakest part"

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "schedule": name,
                "total_us": t.total_us,
                "attention_us": t.attention_us,
                "exposed_us": t.exposed_us,
                "other_us": t.other_us,
            }
            for name, t in self.times.items()
        ]

    def to_json(self) -> dict[str, Any]:
        d = self.deployment
        return {
            "model": d.model.name,
            "gpu": d.gpu.name,
            "num_gpus": d.num_gpus,
            "tokens": self.tokens,
            "best": self.best,
            "schedules": self._rows(),
            "basis": self.basis,
        }

    def to_frame(self) -> pd.DataFrame:
        """One row per schedule, in microseconds."""
        import pandas as pd

        return pd.DataFrame(self._rows()).set_index("schedule")


def prefill(
    model: ModelLike,
    *,
    tokens: int,
    gpus: int = 8,
    cluster: ClusterLike | None = None,
    engine: str = "vllm",
    kv_dtype: str = "bf16",
) -> PrefillResult:
    """Time of one prompt of `tokens` over `gpus`, attention by ring, token-ring and all-gather
    (`moesim.serving.ring`) and on one rank alone; experts over all GPUs in each.

    Raises InputError for fewer than 2 GPUs or tokens that are none, InfeasibleError where a GPU's
    share of the keys and values does not fit beside the weights.
    """
    if gpus < 2 or not gpus <= tokens <= MAX_TOKENS:
        raise InputError(
            f"a prompt of {tokens:,} tokens over {gpus} GPUs",
            f"give 2 GPUs or more, and from a token each to {MAX_TOKENS:,} tokens",
        )
    spec = inputs.model_required(model, "", "the prompt")
    chosen = inputs.cluster_of(cluster, gpus)
    one = deploy(spec, chosen, tp=1, dp=gpus, engine=engine, kv_dtype=kv_dtype)
    room = gpu_memory(one).kv_token_capacity * gpus
    if tokens > room:
        raise InfeasibleError(
            f"the keys and values of {tokens:,} tokens do not fit: {gpus} GPUs hold {room:,}",
            "use more GPUs, or a narrower KV precision",
        )
    cost = EngineStepCost(replace(one, max_batch_tokens=tokens))
    return PrefillResult(one, tokens, prompt_us(cost, tokens), cost.basis)

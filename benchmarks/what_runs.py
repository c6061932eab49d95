"""The page "what runs on my machine": models, machines, engines.

    python benchmarks/what_runs.py [--check]

Writes docs/what-runs.md; with --check says whether it is what the code makes, exit code 1 if not.
A few seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moesim.cluster import load_machine
from moesim.model.weights import load_weights
from moesim.offloading.engines import plan_engines
from moesim.offloading.rates import doubts
from moesim.offloading.task import EnginePlan, Task

PAGE = Path(__file__).parents[1] / "docs" / "what-runs.md"
CONTEXT, PROMPT, OUTPUT = 16384, 4096, 1024
MODELS = {
    "GPT-OSS-20B": ("MXFP4_MOE", "GPT-OSS-20B"),
    "Qwen3-30B-A3B": ("Q4_K_M", "Qwen3-30B-A3B-FP8"),
    "Qwen3.5-35B-A3B": ("Q4_K_M", "Qwen3.5-35B-A3B"),
    "GPT-OSS-120B": ("MXFP4_MOE", "GPT-OSS-120B"),
    "GLM-4.5-Air": ("Q4_K_M", "GLM-4.5-Air"),
    "Qwen3-235B-A22B": ("Q4_K_M", "Qwen3-235B-A22B-FP8"),
    "MiniMax-M2": ("Q4_K_M", "MiniMax-M2"),
    "DeepSeek-V3": ("Q4_K_M", "DeepSeek-V3"),
}
MACHINES = (
    "rtx-5060-ti+ddr5-2ch",
    "rtx-3090+ddr4-2ch",
    "rtx-4090+ddr5-2ch",
    "rtx-5090+ddr5-2ch",
    "rx-7900-xtx+ddr5-2ch",
    "r9700+ddr5-2ch",
    "2xrtx-3090+ddr4-4ch",
    "4xrtx-3090+ddr4-8ch",
    "rtx-4090+ddr5-8ch",
    "rtx-5090+ddr5-12ch",
    "rtx-pro-6000+ddr5-4ch",
    "strix-halo",
    "dgx-spark",
    "m4-max",
    "m3-ultra",
)
ENGINES = ("llama.cpp", "KTransformers", "vLLM")
DOUBTS = "\n".join(
    f"- {text}" for text in dict.fromkeys(t for m in MACHINES for t in doubts(load_machine(m)))
)
HEAD = f"""# What runs on my machine

Tokens/s of one conversation, and prompt tokens/s, of the best placement that each engine can
express: {CONTEXT:,} tokens of context, for a request of {PROMPT:,} tokens and an answer of
{OUTPUT:,}. Regenerate with

```
python benchmarks/what_runs.py
```

and ask about your own with `moesim cache --machine GPU+HOST --model MODEL`
([offloading](offloading.md), [machines](topologies.md#machines)), which prints the line that starts
the engine too.

**What this rests on.** Predictions, none of them measured here: datasheet bandwidths and rates
times assumed shares. On published runs that no constant was set on, the median error is 7% over
all and 13% without KTransformers' table, 31% of whose rows are more than 20% off, each with its
cause as far as it is known; prompts alone are 20% off in the median
([reports/offloading-people](../reports/offloading-people/README.md)). Hosts are round machines of
a kind; routing is assumed uniform. llama.cpp runs the types named, KTransformers and vLLM the
checkpoint's (FP8 where there is one). A dash: it does not fit, or the engine has no kernels for it.
`gpu` is the share of experts in GPU memory under llama.cpp.

{DOUBTS}
"""


def cell(plan: EnginePlan) -> str:
    """Tokens/s, and prompt tokens/s; a dash where it does not run."""
    if plan.problem:
        return "-"
    return f"{_short(plan.decode_tokens_per_s)} / {_short(plan.prompt_tokens_per_s)}"


def _short(value: float) -> str:
    """Two significant digits, three from 100 on."""
    return f"{value:.2g}" if value < 100 else f"{float(f'{value:.3g}'):,.0f}"


def section(name: str) -> str:
    """One model on every machine."""
    quant, checkpoint = MODELS[name]
    weights, own = load_weights(name, quant), load_weights(checkpoint)
    lines = [
        f"\n## {name}\n",
        f"{weights.num_bytes / 1e9:.1f} GB in {quant}; {own.num_bytes / 1e9:.1f} GB as"
        f" {checkpoint}'s checkpoint. Tokens/s / prompt tokens/s.\n",
        f"| machine | {' | '.join(ENGINES)} | gpu |",
        "|---" * (len(ENGINES) + 2) + "|",
    ]
    for machine in MACHINES:
        task = Task(weights, own, load_machine(machine), CONTEXT, PROMPT, OUTPUT)
        plans = {plan.engine: plan for plan in plan_engines(task, ENGINES)}
        share = plans["llama.cpp"]
        held = "-" if share.problem else f"{share.gpu_share:.0%}"
        cells = " | ".join(cell(plans[engine]) for engine in ENGINES)
        lines.append(f"| `{machine}` | {cells} | {held} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page's text."""
    return HEAD + "".join(section(name) for name in MODELS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = page()
    if args.check:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print("up to date" if same else f"{PAGE} is not what the code makes: run without --check")
        raise SystemExit(0 if same else 1)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

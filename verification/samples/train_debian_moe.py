"""Train the small Mixture-of-Experts language model whose trace is `sample:debian-moe`.

    python verification/samples/debian_corpus.py --packages DEBS --out CORPUS
    python verification/samples/train_debian_moe.py --corpus CORPUS --out MODEL --seconds 240
    moesim trace capture --model MODEL --prompts CORPUS/prompts.jsonl --out t.npz

An OLMoE model of 8 layers of width 768, each with 64 experts of width 384, softmax routing, top-8,
from random weights, in bfloat16 with float32 master weights. The time is boxed: the learning rate
falls to a tenth over `--seconds`. The auxiliary loss (Switch Transformers, section 2.2) is taken
layer by layer. MODEL gets the model in Hugging Face format, `loss.csv` and `training.json`.
"""

from __future__ import annotations

import argparse
import csv
import json
import lzma
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"
EVALUATED = 8


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> tuple[torch.Tensor, float]:
    """Mean over layers of E * sum(share of choices * mean probability), 1 when balanced; and the
    largest load of an expert over the mean load, averaged over layers."""
    losses, peaks = [], []
    for logits in router_logits:
        probs = logits.float().softmax(-1)
        chosen = probs.topk(top_k, dim=-1).indices
        num_experts = probs.shape[-1]
        share = torch.bincount(chosen.flatten(), minlength=num_experts).float() / chosen.numel()
        losses.append(num_experts * (share * probs.mean(0)).sum())
        peaks.append(share.max() * num_experts)
    return torch.stack(losses).mean(), float(torch.stack(peaks).mean())


def learning_rate(args: argparse.Namespace, spent: float) -> float:
    """Warm-up over 3% of the time, then a cosine down to a tenth of the peak."""
    if spent < 0.03:
        return float(args.lr * (spent + 1e-4) / 0.03)
    return float(args.lr * (0.55 + 0.45 * math.cos(math.pi * min(1.0, spent))))


def build(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> OlmoeForCausalLM:
    """The untrained model, its weights in bfloat16."""
    end = tokenizer.convert_tokens_to_ids(END)
    config = OlmoeConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=args.hidden,
        intermediate_size=args.expert_width,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        max_position_embeddings=2048,
        router_aux_loss_coef=args.balance,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        use_cache=False,
    )
    torch.manual_seed(args.seed)
    return OlmoeForCausalLM(config).to(args.device, torch.bfloat16)


def train(model: OlmoeForCausalLM, tokens: np.ndarray, args: argparse.Namespace) -> dict[str, Any]:
    """Train for `args.seconds`; write loss.csv; return totals."""
    params = [p for p in model.parameters() if p.requires_grad]
    master = [p.detach().float().requires_grad_() for p in params]
    decayed = [m for m in master if m.dim() > 1]
    others = [m for m in master if m.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=args.device != "cpu",
    )
    num_rows = len(tokens) // args.length
    rows = torch.from_numpy(tokens[: num_rows * args.length].astype(np.int32)).view(num_rows, -1)
    rng = np.random.default_rng(args.seed)
    order = rng.permutation(num_rows)
    start = time.monotonic()
    done = at = epoch = 0
    with (args.out / "loss.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["step", "seconds", "tokens", "loss", "balance_loss", "peak_load", "lr"])
        for step in range(args.max_steps):
            spent = (time.monotonic() - start) / args.seconds
            if spent >= 1:
                break
            if at + args.batch > num_rows:
                order, at, epoch = rng.permutation(num_rows), 0, epoch + 1
            batch = rows[np.sort(order[at : at + args.batch])].to(args.device, torch.int64)
            at += args.batch
            result = model(input_ids=batch, output_router_logits=True, use_cache=False)
            logits = result.logits[:, :-1].flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
            balance, peak = balance_loss(result.router_logits, args.top_k)
            (loss + args.balance * balance).backward()
            del result, logits
            for m, p in zip(master, params, strict=True):
                m.grad = p.grad.float() if p.grad is not None else torch.zeros_like(m)
                p.grad = None
            torch.nn.utils.clip_grad_norm_(master, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, spent)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_copy_(params, master)
            done += batch.numel()
            if step % args.log_every == 0:
                seconds = time.monotonic() - start
                row = [
                    step,
                    f"{seconds:.1f}",
                    done,
                    f"{loss.item():.4f}",
                    f"{balance.item():.4f}",
                    f"{peak:.3f}",
                    f"{optimizer.param_groups[0]['lr']:.2e}",
                ]
                out.writerow(row)
                file.flush()
                print(
                    "step {} {} s {} tokens loss {} balance {} peak {} lr {}".format(*row),
                    flush=True,
                )
    return {
        "steps": step + (spent < 1),
        "tokens": done,
        "epochs": done / len(tokens),
        "seconds": time.monotonic() - start,
        "last_loss": loss.item(),
    }


@torch.inference_mode()
def evaluate(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path, device: str
) -> dict[str, float]:
    """Mean loss per token of EVALUATED held-out documents a domain, 512 tokens of each."""
    sums: dict[str, list[float]] = {}
    seen: dict[str, int] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        seen[record["domain"]] = seen.get(record["domain"], 0) + 1
        if seen[record["domain"]] > EVALUATED:
            continue
        ids = torch.tensor([tokenizer(record["prompt"])["input_ids"][:512]], device=device)
        logits = model(input_ids=ids).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        total = sums.setdefault(record["domain"], [0.0, 0.0])
        total[0] += loss.item()
        total[1] += ids.shape[1] - 1
    return {domain: round(loss / count, 4) for domain, (loss, count) in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--max-steps", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--expert-width", type=int, default=384)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=48, help="rows of --length tokens a step")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--balance", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    from tokenizers import Tokenizer, processors

    raw = Tokenizer.from_file(str(args.corpus / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, raw.token_to_id(END))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=END, eos_token=END, pad_token=END
    )
    tokens = np.frombuffer(lzma.decompress((args.corpus / "tokens.xz").read_bytes()), np.uint16)
    model = build(args, tokenizer)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(tokens):,} tokens, {size:,} parameters, {args.device}", flush=True)
    totals = train(model, tokens, args)
    model.eval()
    totals["held_out_loss"] = evaluate(model, tokenizer, args.corpus / "prompts.jsonl", args.device)
    totals["parameters"] = size
    totals["torch"] = torch.__version__
    model.config.use_cache = True
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(totals, indent=1) + "\n")
    print(json.dumps(totals), flush=True)


if __name__ == "__main__":
    main()

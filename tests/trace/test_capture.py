"""Capture on tiny models: what is recorded is what the routers decide, token by token."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install moesim[capture]")
pytest.importorskip("transformers", reason="transformers is missing: pip install moesim[capture]")

import sys

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
import capture_models as models

from moesim.cli.main import run as run_cli
from moesim.errors import FormatError, InputError, MismatchError
from moesim.trace import capture as capture_module
from moesim.trace.capture import CaptureOptions, capture
from moesim.trace.capture_hooks import RoutingRecorder, find_layers
from moesim.trace.format import Trace, load_trace

PROMPTS = [
    ("Hello, world. How are you today?", "greeting"),
    ("x = 1\n", "code"),
    ("Ein etwas längerer deutscher Satz.", "german"),
    ("def f(a, b): return a + b", "code"),
    ("yes", "greeting"),
]


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    lines = [json.dumps({"prompt": p, "domain": d}) for p, d in PROMPTS]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="session")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_family("olmoe", tmp_path_factory.mktemp("models") / "olmoe")


def options(model: Path, prompts: Path, out: Path, **changed: Any) -> CaptureOptions:
    settings = {"max_new_tokens": 4, "batch_size": 2, "device": "cpu", "seed": 3, **changed}
    return CaptureOptions(model=str(model), prompts=prompts, out=out, **settings)


def load(path: Path) -> Trace:
    trace = load_trace(path)
    assert isinstance(trace, Trace)
    return trace


@pytest.mark.parametrize("name", list(models.FAMILIES))
def test_ids_and_weights_are_those_of_the_routers(name: str, prompts: Path, tmp_path: Path) -> None:
    folder = models.save_family(name, tmp_path / name)
    result = capture(options(folder, prompts, tmp_path / "t.npz"))
    trace = load(tmp_path / "t.npz")
    lengths = [len(text.encode()) for text, _ in PROMPTS]
    assert (result.num_prefill_tokens, result.num_decode_tokens) == (sum(lengths), 4 * 5)
    assert trace.meta.layer_ids == tuple(
        range(models.FAMILIES[name].first_moe_layer, models.LAYERS)
    )
    assert trace.num_experts == models.EXPERTS
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert trace.gate_weights is not None
    assert trace.token_ids is not None
    assert trace.domain_ids is not None
    for number, (_, domain) in enumerate(PROMPTS):
        rows = np.flatnonzero(trace.request_ids == number)
        assert trace.positions[rows].tolist() == list(range(lengths[number] + 4))
        assert trace.phases[rows].tolist() == [0] * lengths[number] + [1] * 4
        assert {trace.meta.domains[d] for d in trace.domain_ids[rows]} == {domain}
        ids, weights = models.reference(name, model, trace.token_ids[rows])
        order, wanted = np.argsort(trace.expert_ids[rows], -1), np.argsort(ids, -1)
        np.testing.assert_array_equal(
            np.take_along_axis(trace.expert_ids[rows], order, -1),
            np.take_along_axis(ids, wanted, -1),
        )
        np.testing.assert_allclose(
            np.take_along_axis(trace.gate_weights[rows].astype(np.float32), order, -1),
            np.take_along_axis(weights, wanted, -1),
            atol=2e-3,
        )


def test_prompts_alone_are_prefill(olmoe: Path, prompts: Path, tmp_path: Path) -> None:
    capture(options(olmoe, prompts, tmp_path / "t", max_new_tokens=0, gate_weights=False))
    trace = load(tmp_path / "t")
    assert trace.gate_weights is None
    assert set(np.asarray(trace.phases).tolist()) == {0}
    tokens = [np.asarray(trace.token_ids)[trace.request_ids == i] for i in range(5)]
    tokenizer = models.byte_tokenizer()
    assert [tokenizer.decode(t) for t in tokens] == [text for text, _ in PROMPTS]


def test_long_prompts_are_cut_and_the_cut_is_prefix_of_the_whole(
    olmoe: Path, prompts: Path, tmp_path: Path
) -> None:
    for size, name in ((2048, "whole"), (7, "cut")):
        capture(options(olmoe, prompts, tmp_path / name, max_new_tokens=0, max_prompt_tokens=size))
    whole, cut = load(tmp_path / "whole"), load(tmp_path / "cut")
    keep = np.flatnonzero(whole.positions < 7)
    by_request = keep[np.lexsort((whole.positions[keep], whole.request_ids[keep]))]
    again = np.lexsort((cut.positions, cut.request_ids))
    np.testing.assert_array_equal(whole.expert_ids[by_request], cut.expert_ids[again])


def test_batch_size_changes_no_prefill_choice(olmoe: Path, prompts: Path, tmp_path: Path) -> None:
    """Padding must not reach the trace: alone, a prompt has none."""
    seen = []
    for size in (1, 5):
        capture(options(olmoe, prompts, tmp_path / f"{size}", max_new_tokens=0, batch_size=size))
        trace = load(tmp_path / f"{size}")
        seen.append(trace.expert_ids[np.lexsort((trace.positions, trace.request_ids))])
    np.testing.assert_array_equal(*seen)


def test_a_stopped_capture_goes_on_and_ends_the_same(
    olmoe: Path, prompts: Path, tmp_path: Path
) -> None:
    capture(options(olmoe, prompts, tmp_path / "whole.npz"))

    class KilledError(Exception):
        pass

    def kill_at_the_second_batch(done: int, total: int) -> None:
        if done >= 4:
            raise KilledError

    target = options(olmoe, prompts, tmp_path / "t.npz")
    with pytest.raises(KilledError):
        capture(target, progress=kill_at_the_second_batch)
    assert not target.out.exists()
    journal = tmp_path / "t.npz.partial"
    (journal / ".0000002-x.npz").write_bytes(b"half a piece")
    notes: list[str] = []
    result = capture(target, notes.append)
    assert (result.num_resumed, result.num_batches) == (2, 3)
    assert "2 finished batches" in notes[0]
    assert target.out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not journal.exists()


KILLED = """
import json, os, signal, sys
from pathlib import Path
import numpy as np
from moesim.trace import capture_journal
from moesim.trace.capture import CaptureOptions, capture

model, prompts, folder, warm = sys.argv[1:]
capture(CaptureOptions(model, Path(prompts), Path(warm), 4, 2, device="cpu", seed=3))
savez, append = np.savez, capture_journal.TraceWriter.append

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def half_a_piece(file, **arrays):
    if list(Path(file.name).parent.glob("0*.npz")):
        file.write(b"PK half")
        file.flush()
        die()
    savez(file, **arrays)

def half_a_trace(self, **arrays):
    append(self, **arrays)
    die()

found = []
for name in ("t.npz", "t"):
    for point in ("piece", "trace"):
        if not (child := os.fork()):
            np.savez = half_a_piece if point == "piece" else savez
            if point == "trace":
                capture_journal.TraceWriter.append = half_a_trace
            out = Path(folder, name)
            capture(CaptureOptions(model, Path(prompts), out, 4, 2, device="cpu", seed=3))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        names = sorted(os.listdir(folder))
        pieces = len(list(Path(folder, name + ".partial").glob("0*.npz")))
        found.append([os.waitstatus_to_exitcode(status), names, pieces])
print(json.dumps(found))
"""


def test_a_killed_capture_goes_on_and_ends_the_same(
    olmoe: Path, prompts: Path, tmp_path: Path
) -> None:
    """SIGKILL of the process in the middle of writing its second batch, and once more in the
    middle of writing the trace: nothing but the journal is left, and the third run finishes."""
    (tmp_path / "k").mkdir()
    whole = [options(olmoe, prompts, tmp_path / name) for name in ("t.npz", "t")]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, (olmoe, prompts, tmp_path / "k", whole[0].out))],
        capture_output=True,
        timeout=120,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert json.loads(done.stdout) == [
        [-signal.SIGKILL, ["t.npz.partial"], 1],
        [-signal.SIGKILL, ["t.npz.partial"], 3],
        [-signal.SIGKILL, ["t.npz.partial", "t.partial"], 1],
        [-signal.SIGKILL, ["t.npz.partial", "t.partial"], 3],
    ]
    capture(whole[1])
    for expected in whole:
        target = options(olmoe, prompts, tmp_path / "k" / expected.out.name)
        result = capture(target)
        assert (result.num_resumed, result.num_batches) == (3, 3)
        assert contents(target.out) == contents(expected.out)
    assert sorted(p.name for p in (tmp_path / "k").iterdir()) == ["t", "t.npz"]


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else path.iterdir()
    return {"" if path.is_file() else file.name: file.read_bytes() for file in files}


def test_a_journal_of_other_inputs_is_refused(olmoe: Path, prompts: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(options(olmoe, prompts, tmp_path / "t.npz"), progress=stop)
    with pytest.raises(MismatchError, match="another capture: it differs in seed"):
        capture(options(olmoe, prompts, tmp_path / "t.npz", seed=4))
    (tmp_path / "t.npz.partial" / "0000000.npz").write_bytes(b"damaged")
    with pytest.raises(InputError, match="damaged: "):
        capture(options(olmoe, prompts, tmp_path / "t.npz"))


def test_same_seed_same_bytes_other_seed_other_decode(
    olmoe: Path, prompts: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        capture(options(olmoe, prompts, tmp_path / f"{name}.npz", seed=seed))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    a, c = load(tmp_path / "a.npz"), load(tmp_path / "c.npz")
    decode = a.phases == 1
    np.testing.assert_array_equal(a.expert_ids[~decode], c.expert_ids[~decode])
    assert (a.token_ids[decode] != c.token_ids[decode]).any()  # type: ignore[index]


def test_decode_ends_where_the_text_ends(olmoe: Path, prompts: Path, tmp_path: Path) -> None:
    """Greedy decoding gives some token first; with that token as the end, a request has no decode
    tokens: the end itself never passes the model."""
    capture(options(olmoe, prompts, tmp_path / "a", temperature=0.0))
    before = load(tmp_path / "a")
    rows = np.flatnonzero((before.request_ids == 1) & (before.phases == 1))
    end = int(before.token_ids[rows[2]])  # type: ignore[index]
    model = transformers.AutoModelForCausalLM.from_pretrained(olmoe)
    model.generation_config.eos_token_id = end
    folder = tmp_path / "ends"
    model.save_pretrained(folder)
    models.byte_tokenizer().save_pretrained(folder)
    capture(options(folder, prompts, tmp_path / "b", temperature=0.0))
    after = load(tmp_path / "b")
    for number in range(5):
        old = before.token_ids[(before.request_ids == number) & (before.phases == 1)]  # type: ignore[index]
        new = after.token_ids[(after.request_ids == number) & (after.phases == 1)]  # type: ignore[index]
        stop = old.tolist().index(end) if end in old else 4
        assert new.tolist() == old[:stop].tolist()


def test_memory_is_one_batch(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorder is emptied batch by batch, and prompts are read a window at a time."""
    file = tmp_path / "p.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(80)))
    held: list[int] = []
    take = RoutingRecorder.take

    def watched(self: RoutingRecorder, *args: Any, **kwargs: Any) -> Any:
        held.append(sum(len(ids) for layer in self.layers for ids, _ in layer.blocks))
        return take(self, *args, **kwargs)

    monkeypatch.setattr(RoutingRecorder, "take", watched)
    monkeypatch.setattr(capture_module, "WINDOW_BATCHES", 4)
    capture(options(olmoe, file, tmp_path / "t", max_new_tokens=1))
    assert len(held) == 40
    assert max(held) <= 2 * (len("prompt 79") + 1) * models.LAYERS


def switch_model() -> Any:
    config = transformers.SwitchTransformersConfig(
        vocab_size=models.VOCAB, d_model=32, d_kv=8, d_ff=16, num_heads=4, num_layers=2,
        num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        num_experts=4, expert_capacity=2, pad_token_id=256, eos_token_id=257,
        decoder_start_token_id=256, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config)


def nllb_model() -> Any:
    config = transformers.NllbMoeConfig(
        vocab_size=models.VOCAB, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=16,
        decoder_ffn_dim=16, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2,
        pad_token_id=256, eos_token_id=257, bos_token_id=256, decoder_start_token_id=257,
        max_position_embeddings=300, moe_eval_capacity_token_fraction=-1.0, expert_capacity=3,
    )  # fmt: skip
    return transformers.NllbMoeForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["switch", "nllb"])
def test_encoder_decoder_models_by_name(kind: str, prompts: Path, tmp_path: Path) -> None:
    """Encoder tokens are prefill and have the encoder's layers alone, decoder tokens the
    decoder's; a token beyond an expert's capacity has -1 there."""
    torch.manual_seed(5)
    folder = models.save_model(
        switch_model() if kind == "switch" else nllb_model(), tmp_path / kind
    )
    capture(options(folder, prompts, tmp_path / "t", batch_size=1, temperature=0.0))
    trace = load(tmp_path / "t")
    assert trace.expert_ids.dtype == np.int16
    assert trace.meta.layer_ids == (1, 3)
    assert trace.top_k == (1 if kind == "switch" else 2)
    encoder = trace.phases == 0
    assert (trace.expert_ids[encoder, 1] == -1).all()
    assert (trace.expert_ids[~encoder, 0] == -1).all()
    assert (trace.expert_ids[~encoder, 1, 0] >= 0).all()
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    router = next(m for n, m in model.named_modules() if n.endswith("router"))
    seen: list[Any] = []
    router.register_forward_hook(lambda _, args, out: seen.append(out))
    rows = np.flatnonzero((trace.request_ids == 2) & encoder)
    with torch.inference_mode():
        model.get_encoder()(
            input_ids=torch.tensor(np.asarray(trace.token_ids)[rows][None].astype(np.int64))
        )
    logits = seen[0][2].reshape(-1, 4).numpy()
    probs = models.softmax(logits)
    ranked = models.largest(probs, 2)
    left = dict.fromkeys(range(4), 2 if kind == "switch" else 3)
    wanted = np.full((len(rows), trace.top_k), -1)
    for choice in range(trace.top_k):
        if choice:
            firsts = np.bincount(ranked[:, 0], minlength=4)
            left = {expert: 3 - int(firsts[expert]) for expert in range(4)}
        for token, expert in enumerate(ranked[:, choice]):
            left[expert] -= 1
            wanted[token, choice] = expert if left[expert] >= 0 else -1
    assert (wanted == -1).any()
    got = trace.expert_ids[rows, 0]
    np.testing.assert_array_equal(np.sort(got, -1), np.sort(wanted, -1))


def test_gpt_oss_with_mxfp4_kernels_is_read_at_its_router(tmp_path: Path) -> None:
    """The kernels need a GPU; the module that stands for them here takes what those of release
    5.17 take, so that only the layer's own input and router can give the routing."""
    folder = models.save_family("gpt_oss", tmp_path / "g")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    plain = {layer.name: layer.module for layer in find_layers(model)}

    class Mxfp4GptOssExperts(torch.nn.Module):
        def __init__(self, experts: Any) -> None:
            super().__init__()
            self.inner, self.num_experts = experts, models.EXPERTS

        def forward(self, hidden_states: Any, routing_data: Any, gather_idx: Any) -> Any:
            return self.inner(hidden_states, *routing_data)

    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts(layer.mlp.experts)

        def forward(hidden: Any, mlp: Any = layer.mlp) -> Any:
            flat = hidden.reshape(-1, hidden.shape[-1])
            _, scores, ids = mlp.router(flat)
            return mlp.experts(flat, (ids, scores), None).reshape(hidden.shape), scores

        layer.mlp.forward = forward
    tokens = np.arange(40, 60)
    ids, weights = models.reference("gpt_oss", model, tokens)
    for layer in model.model.layers:
        layer.mlp.experts.inner.__class__ = type("Hidden", (type(layer.mlp.experts.inner),), {})
    with RoutingRecorder(model) as recorder, torch.inference_mode():
        assert [layer.name for layer in recorder.layers] == list(plain)
        model(input_ids=torch.tensor(tokens[None]))
        got, gates = recorder.take(20)
    np.testing.assert_array_equal(got, ids)
    np.testing.assert_allclose(gates, weights, atol=1e-5)


def test_identity_experts_are_no_experts() -> None:
    class SomeExperts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts = 6
            self.down_proj = torch.nn.Parameter(torch.zeros(4, 2, 2))

        def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
            return hidden_states

    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([SomeExperts()])})
    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList(
        [torch.nn.ModuleDict({"experts": SomeExperts()})])})})  # fmt: skip
    with RoutingRecorder(model) as recorder:
        model["model"]["layers"][0]["experts"](
            torch.zeros(2, 2),
            torch.tensor([[3, 5], [4, 0]]),
            torch.tensor([[0.5, 0.5], [0.7, 0.3]]),
        )
        ids, weights = recorder.take(2)
    assert recorder.num_experts == 4
    assert ids[:, 0].tolist() == [[3, -1], [-1, 0]]
    np.testing.assert_allclose(weights[:, 0], [[0.5, 0], [0, 0.3]])


def test_dense_models_and_strange_counts_are_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**models.SMALL, "intermediate_size": 16})
    dense = transformers.LlamaForCausalLM(config)
    with pytest.raises(InputError, match="no MoE layer that can be captured"):
        find_layers(dense)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        models.save_family("olmoe", tmp_path / "o")
    )
    with RoutingRecorder(model) as recorder, torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2, 3]]))
        with pytest.raises(MismatchError, match="routed 3 tokens where 4 passed"):
            recorder.take(4)


@pytest.mark.parametrize(
    ("content", "suffix", "error"),
    [
        (b"", ".txt", "there are no prompts"),
        (b"\n \n", ".txt", "there are no prompts"),
        (b"\xff\xfe", ".txt", "line 1 is not UTF-8"),
        (b'{"prompt": "a"}\n{"prompt": 3}\n', ".jsonl", "line 2: prompt is not a text"),
        (b'{"prompt": "a"}\n["a"]\n', ".jsonl", "line 2 is not a JSON object"),
        (b'{"prompt": "a", "domain": 1}', ".jsonl", "line 1: domain is not a text"),
        (b"[" * 100_000, ".jsonl", "line 1 is not JSON"),
        (b'{"prompt": "\\ud800"}', ".jsonl", "half a surrogate"),
    ],
)
def test_bad_prompts_name_the_line(
    content: bytes, suffix: str, error: str, olmoe: Path, tmp_path: Path
) -> None:
    file = tmp_path / f"p{suffix}"
    file.write_bytes(content)
    with pytest.raises(FormatError, match=error):
        capture(options(olmoe, file, tmp_path / "t.npz"))
    assert not list(tmp_path.glob("t.npz*"))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--model", "MISSING"], "cannot load"),
        (["--prompts", "MISSING"], "cannot read"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--max-new-tokens", "-1"], "--max-new-tokens -1"),
        (["--max-new-tokens", "500"], "leaves no room for a prompt"),
        (["--temperature", "nan"], "'nan' is no number"),
        (["--dtype", "int3"], "--dtype 'int3'"),
        (["--device", "nowhere"], "cannot load"),
        (["--out", "EXISTING"], "exists already"),
        (["--out", "NOWHERE"], "there is no folder"),
        (["--model", "SILENT"], "has no tokenizer"),
        (["--chat"], "no chat template"),
    ],
)
def test_wrong_arguments_get_two_lines(
    arguments: list[str],
    error: str,
    olmoe: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder").mkdir()
    names = {
        "MISSING": str(tmp_path / "missing"),
        "EXISTING": str(tmp_path / "folder"),
        "NOWHERE": str(tmp_path / "missing" / "t.npz"),
        "SILENT": str(tmp_path / "silent"),
    }
    if "SILENT" in arguments:
        shutil.copytree(olmoe, names["SILENT"], ignore=shutil.ignore_patterns("token*"))
    given = {
        "--model": str(olmoe),
        "--prompts": str(prompts),
        "--out": str(tmp_path / "t.npz"),
        "--device": "cpu",
    }
    flags = [a for a in arguments if a == "--chat"]
    pairs = [] if flags else [(arguments[0], names.get(arguments[1], arguments[1]))]
    given.update(pairs)
    line = ["trace", "capture", *flags, *(x for pair in given.items() for x in pair)]
    assert run_cli(line) == 2
    text = capsys.readouterr()
    assert error in text.err
    assert "remedy: " in text.err
    assert text.out == ""
    assert not list(tmp_path.glob("t.npz*"))


def test_command_line_and_json(
    olmoe: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["trace", "capture", "--model", str(olmoe), "--prompts", str(prompts), "--device", "cpu",
            "--max-new-tokens", "2", "--name", "tiny", "--license", "CC0-1.0", "--json",
            "--out", str(tmp_path / "t.npz")]  # fmt: skip
    assert run_cli(line) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["num_decode_tokens"] == 10
    assert summary["domains"] == ["code", "german", "greeting"]
    meta = load(tmp_path / "t.npz").meta
    assert (meta.model, meta.license) == ("tiny", "CC0-1.0")
    assert run_cli(["trace", "check", str(tmp_path / "t.npz")]) == 0


def test_the_run_of_the_guide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its model and prompts, captured without decoding, which depends on releases of torch."""
    page = (Path(__file__).parents[2] / "docs" / "capture.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    command = next(
        x for x in page.splitlines() if x.startswith("moesim trace capture --model tiny")
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/capture.md", "exec"), {})
    assert run_cli([*command.split()[1:], "--max-new-tokens", "0"]) == 0
    said = page.split("The capture says\n\n```text\n")[1].split(" prefill")[0]
    assert capsys.readouterr().out.startswith(f"{said} prefill")


@pytest.mark.parametrize("name", list(models.FAMILIES))
def test_candidates_are_the_routers_scores_in_order(
    name: str, prompts: Path, tmp_path: Path
) -> None:
    """Softmax or sigmoid of all 8 logits, taken here from the routers by the test itself."""
    folder = models.save_family(name, tmp_path / name)
    capture(options(folder, prompts, tmp_path / "t.npz", candidates=5))
    trace = load(tmp_path / "t.npz")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert trace.token_ids is not None
    assert trace.candidate_ids is not None
    assert trace.candidate_scores is not None
    assert trace.num_candidates == 5
    for number in range(len(PROMPTS)):
        rows = np.flatnonzero(trace.request_ids == number)
        scores = models.router_scores(name, model, trace.token_ids[rows])
        ids = np.argsort(-scores, axis=-1, kind="stable")[..., :5]
        listed = np.take_along_axis(scores, trace.candidate_ids[rows].astype(int), -1)
        np.testing.assert_allclose(trace.candidate_scores[rows], listed, atol=2e-3)
        np.testing.assert_allclose(np.take_along_axis(scores, ids, -1), listed, atol=1e-5)


def test_a_trace_without_candidates_is_as_before(
    olmoe: Path, prompts: Path, tmp_path: Path
) -> None:
    for count in (0, 5):
        capture(options(olmoe, prompts, tmp_path / f"{count}", candidates=count))
    without, listed = load(tmp_path / "0"), load(tmp_path / "5")
    assert without.candidate_ids is None
    np.testing.assert_array_equal(without.expert_ids, listed.expert_ids)
    assert (np.sort(listed.expert_ids, -1) == np.sort(listed.candidate_ids[..., :3], -1)).all()


@pytest.mark.parametrize(
    ("count", "cause"), [(3, "a token chooses 3"), (9, "8 experts"), (-1, "candidates -1")]
)
def test_numbers_of_candidates_that_cannot_be(
    count: int, cause: str, olmoe: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=cause):
        capture(options(olmoe, prompts, tmp_path / "t.npz", candidates=count))


def test_a_router_that_is_not_known_is_named(olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesim.trace import capture_candidates

    monkeypatch.setattr(capture_candidates, "SOFTMAX", frozenset())
    model = transformers.AutoModelForCausalLM.from_pretrained(olmoe)
    with pytest.raises(InputError, match="OlmoeTopKRouter"):
        capture_candidates.CandidateRecorder(model, find_layers(model), 5)


def test_a_captured_trace_can_be_rerouted(olmoe: Path, prompts: Path, tmp_path: Path) -> None:
    """From the model to a rule that reads candidates: 5 experts for 3, two added for each."""
    from moesim.routing.api import reroute

    capture(options(olmoe, prompts, tmp_path / "t.npz", candidates=6))
    trace = load(tmp_path / "t.npz")
    done = reroute(trace, "k:k=5")
    assert done.changes.added == 2 * trace.num_tokens * trace.num_layers
    assert done.changes.kept == done.changes.choices
    assert done.trace.num_candidates == 6

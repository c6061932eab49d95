"""`calibrate --host`: a file that machines take, whatever this computer is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from moesim.cli.calibrate import calibrate
from moesim.cluster import load_host, load_machine
from moesim.errors import InputError
from moesim.offloading import measure_host
from moesim.offloading.measure_host import vectors_of
from moesim.offloading.rates import cpu_rates

runner = CliRunner()
app = typer.Typer()
app.command()(calibrate)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that take milliseconds: what is asserted does not depend on the rates."""
    monkeypatch.setattr(measure_host, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(measure_host, "EXPERT_SHAPE", (128, 64))


def test_the_file_is_a_host_of_machines(small: None, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    done = runner.invoke(app, ["--host", "--out", str(out), "--name", "mine"])
    assert done.exit_code == 0, done.output
    machine = load_machine(f"rtx-3090+{out}")
    assert machine.host.name == "mine"
    assert machine.host.kernels is not None
    assert machine.host == load_host(str(out))
    kinds = {block.where: block.kind for block in machine.host.blocks}
    assert kinds["host mine: memory"] == "measured"


def test_json_has_the_same_content(small: None, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    done = runner.invoke(app, ["--host", "--out", str(out), "--json"])
    found = json.loads(done.stdout)
    assert found["kernels"]["kind"] == "measured"
    assert found["link"]["kind"] in ("measured", "assumed")


def test_other_options_are_refused(tmp_path: Path) -> None:
    out = str(tmp_path / "mine.yaml")
    done = runner.invoke(app, ["--host", "--out", out, "--section", "ffn"])
    assert isinstance(done.exception, InputError)


def test_the_widest_vectors_count() -> None:
    assert vectors_of(["avx2", "avx512f", "amx_tile"]) == "amx"
    assert vectors_of(["avx2", "avx512f"]) == "avx512"
    assert vectors_of(["avx2", "avx_vnni"]) == "avx_vnni"
    assert vectors_of(["sse2", "avx2"]) == "avx2"
    assert vectors_of(["fp", "asimd"]) == "neon"
    with pytest.raises(InputError):
        vectors_of(["sse2"])


def test_measured_kernels_replace_what_channels_say() -> None:
    """The file of xeon-16vcpu: 54.5 GB/s after 210 us, 2.46 TFLOPS; ddr5-2ch has no kernels, so
    0.65 x 89.6 GB/s and 16 cores x 4.5 GHz x 12 flop."""
    measured = cpu_rates(load_host("xeon-16vcpu"), 1.0)
    assert (measured.read, measured.flops) == pytest.approx((54.5e9, 2.46e12))
    assert measured.call_s == pytest.approx(210e-6)
    assumed = cpu_rates(load_host("ddr5-2ch"), 1.0)
    assert (assumed.read, assumed.flops) == pytest.approx((58.24e9, 16 * 4.5e9 * 12))

"""`calibrate --host`: this computer as a host file, for `--machine`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cluster.machine import Host, load_host
from moesim.files import atomic_write
from moesim.jobs.result import Result

if TYPE_CHECKING:
    import pandas as pd

NOT_MEASURED = {
    "pcie_gb_per_s": 32.0,
    "kind": "assumed",
    "source": "PCIe Gen4 x16; no CUDA device was there to measure",
}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class HostMeasured(Result):
    """What was measured, as in `file`."""

    file: Path
    host: Host
    content: dict[str, Any]

    def line(self) -> str:
        return f"{self.host.title}: {self.host.dram_gb_per_s:g} GB/s of memory"

    def summary(self) -> str:
        host, link = self.host, self.content["link"]
        call_us, read, tflops = host.kernels or (0.0, 0.0, 0.0)
        return "\n".join(
            (
                f"{self.file}: {host.title}, {host.dram_gb:g} GB",
                f"memory: {host.dram_gb_per_s:.1f} GB/s by all cores",
                f"experts on the CPU: {read:.1f} GB/s on one token after {call_us:.0f} us,"
                f" {tflops:.2f} TFLOPS on many (numpy, float32)",
                f"host link: {host.pcie_gb_per_s:.1f} GB/s, {link['kind']} ({link['source']})",
                f"use it with --machine GPU+{self.file}",
            )
        )

    def to_json(self) -> dict[str, Any]:
        return {"file": str(self.file), **self.content}

    def to_frame(self) -> pd.DataFrame:
        import pandas as pd

        rows = [
            {"block": block, "figure": key, "value": value}
            for block in ("memory", "cpu", "kernels", "link")
            for key, value in self.content[block].items()
        ]
        return pd.DataFrame(rows)


def calibrate_host(
    out: str | os.PathLike[str],
    *,
    name: str = "host",
    progress: Callable[[str], None] = lambda _: None,
) -> HostMeasured:
    """Measure memory, expert-sized matrix products and the GPU's link, and write a host file.

    The link is measured with torch on a CUDA device, and assumed without one. Raises InputError
    where nothing can be measured, FormatError for a name that files cannot have.
    """
    import yaml

    from moesim.offloading.measure_host import measure_host
    from moesim.replay.host_link import measure_link

    content = measure_host(name, progress)
    progress("host link")
    found = measure_link()
    content["link"] = NOT_MEASURED if found is None else {
        "pcie_gb_per_s": round(found[0], 1),
        "kind": "measured",
        "source": f"pinned copies to {found[1]} with torch",
    }  # fmt: skip
    path = Path(out)
    atomic_write(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return HostMeasured(path, load_host(str(path.resolve())), content)

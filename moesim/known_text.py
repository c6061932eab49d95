"""Text that people have at hand and moesim does not read: what it is, and the page that helps."""

from __future__ import annotations

import re

_TOPO = re.compile(r"^\s*GPU0\s+(?:\S+\s+)*?(?:CPU Affinity|GPU1|NIC0|mlx5_0)", re.MULTILINE)
_TOPO_ROW = re.compile(r"^GPU\d+\s.*\bX\b", re.MULTILINE)
_NCCL = re.compile(r"\balgbw\s+busbw\b|^#\s*nThread\s+\d+\s+nGpus\s+\d+", re.MULTILINE)


def known_text(text: str) -> tuple[str, str] | None:
    """(what it is, the remedy that names a page) for the beginning of a file, or None."""
    if _TOPO.search(text) and _TOPO_ROW.search(text):
        return (
            "the matrix of nvidia-smi topo -m",
            "it has no bandwidths: take the shipped cluster that it matches, or write a cluster"
            ' file from it, as docs/topologies.md says under "From nvidia-smi topo -m"',
        )
    if _NCCL.search(text):
        return (
            "a log of nccl-tests",
            "its times go into a calibration file, as docs/calibration.md says under"
            ' "From a log of nccl-tests"',
        )
    return None

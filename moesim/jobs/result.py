"""What every job returns: small objects that print well."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.files import atomic_write

if TYPE_CHECKING:
    import pandas as pd

    from moesim.draw import Picture


class Result:
    """Base of results; subclasses fill in line, summary, JSON, frame and picture."""

    __slots__ = ()

    def line(self) -> str:
        """The answer in one line."""
        raise NotImplementedError

    def summary(self) -> str:
        """What the command prints on standard output."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """What the command prints with `--json`."""
        raise NotImplementedError

    def to_frame(self) -> pd.DataFrame:
        """The figures as a pandas frame."""
        raise NotImplementedError

    def picture(self) -> Picture:
        """What `plot` draws."""
        raise NotImplementedError

    def plot(self, path: str | Path | None = None) -> Picture:
        """The picture; written to `path` (.png, .svg or .pdf) where one is given."""
        drawn = self.picture()
        if path is not None:
            drawn.save(path)
        return drawn

    def save(self, path: str | Path) -> Path:
        """Write the result as the command's --out does; returns the path."""
        atomic_write(Path(path), json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")
        return Path(path)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.line()}>"

    def _repr_html_(self) -> str:
        return f"<p><b>{html.escape(self.line())}</b></p>{self.to_frame().to_html(border=0)}"

"""Pictures: one subject per file, from plain frames and figures, for `--plot`, page and notebooks.

A function of this package gives a `Picture`: `save` writes it, a notebook shows it, and
`moesim.report` puts it into its page. `poster` lays several out in one file.
"""

from moesim.draw.picture import SUFFIXES, Picture, check_target, poster, save

__all__ = ["SUFFIXES", "Picture", "check_target", "poster", "save"]

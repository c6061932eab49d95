"""Pictures: one file each, from plain frames and figures."""

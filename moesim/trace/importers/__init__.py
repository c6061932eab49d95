"""Readers of other tools' routing dumps, one file a source."""

"""Compiled search passes."""

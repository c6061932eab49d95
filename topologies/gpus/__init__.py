"""Nominal figures of GPU types."""

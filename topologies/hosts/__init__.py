"""Nominal figures of host types."""

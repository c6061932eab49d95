"""Shapes of published models."""

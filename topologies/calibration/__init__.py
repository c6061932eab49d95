"""Calibration tables: what GPUs and links were measured to take."""

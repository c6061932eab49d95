"""Cluster descriptions, GPU specs and calibration tables as YAML."""

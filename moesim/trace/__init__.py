"""Routing traces: which experts every token chose in every MoE layer."""

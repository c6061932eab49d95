"""Serving: deployments, what their steps cost, and requests through them."""

"""moesim plans, simulates and validates the deployment of Mixture-of-Experts models."""

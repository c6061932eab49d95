"""The event simulation of steps on a cluster."""

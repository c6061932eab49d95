"""Placement solvers: one method a file behind one protocol (see moesim.solvers.base)."""

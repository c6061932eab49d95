"""Orders in which a step's kernels and collectives are launched, one file each."""

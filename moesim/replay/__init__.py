"""The same trace through the same plan on real GPUs: calibrate, validate, offload.

`python -m moesim.replay` under torchrun imports torch, numpy, the plan and trace readers and the
cache's policy state alone, so that it runs inside a serving engine's container. `compare` is the
exception: it sits above the cost model and is never imported by the rest of this package.
"""

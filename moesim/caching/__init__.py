"""Offloading: expert caches, prefetch and prediction, and caching plans for models that do not fit.

The words used throughout the package:

- an *event* is what one MoE layer asks for in one forward step: the set of distinct experts that
  the step's tokens chose;
- an *access* is one expert of one event; a *hit* is an access whose expert is in the cache when it
  is classified, everything else is a *miss*;
- *slots* or *capacity* is the number of experts of a layer that fit in fast memory.
"""

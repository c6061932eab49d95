"""Expert memory in the event simulation: caches, host links, NVMe, stalls."""

"""Small real routing traces, bundled as `sample:NAME`; each with its provenance beside it."""

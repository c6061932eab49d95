"""Models: sizes, presets, Hugging Face files, quantisation."""

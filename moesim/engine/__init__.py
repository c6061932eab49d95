"""Plug-ins that run inside a serving engine: a recorded routing trace in place of its router.

`content` writes what a run needs into one file, `model_folder` a model of random weights, `launch`
the environment and command line. `vllm` is the plug-in that vLLM loads in every process; it needs
numpy and torch alone. Files of this package that a plug-in imports at start (`content`,
`schedule`, `vllm`) import neither torch nor the engine at module level.
"""

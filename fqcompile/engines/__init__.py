"""What vLLM, SGLang and transformers load of a compressed-tensors checkpoint, as rules.

Facts read in the sources of vLLM 0.33, SGLang 0.5.23, transformers 5.23 and compressed-tensors
0.20, or seen by loading. Nothing here imports an engine.
"""

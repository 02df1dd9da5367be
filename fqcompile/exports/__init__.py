"""A quantised model as a compressed-tensors checkpoint: for vLLM, SGLang and transformers.

layout       rows of packed weights -> layers by the checkpoint's names (q_proj, experts.3.w1)
harmonise    one scheme for what an engine fuses; scales are repeated, codes never changed
config       targets, groups and ignore
check        by the rules of the engines, before anything is written
write        shards one tensor at a time, then one rename
"""

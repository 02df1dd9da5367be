"""Checkpoints for and from other programs: compressed-tensors both ways, GPTQ and AWQ in.

export       export_contents   rows of packed weights -> layers by the checkpoint's names
             export_blocks     one scheme for what an engine fuses, codes are never changed; then
                               tensors, one at a time
             export_config     targets, groups and ignore
             check             by the rules of the engines, before anything is written
             export_directory  shards, then one rename
load         gptq, awq, compressed_tensors   config and headers -> which layers are packed, and how
             assemble          layers -> the model's weights: experts stacked, gate above up
check        layer_rules, expert_rules   what vLLM, SGLang and transformers load, as read
                               in the sources of vLLM 0.33, SGLang 0.5.23, transformers 5.23,
                               compressed-tensors 0.20 or seen by loading; no engine is imported
"""

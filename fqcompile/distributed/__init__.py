"""Models whose weights are spread over the ranks of torch.distributed: what is particular to them.

ranks    which rank this process is; that all compile the same, or say so instead of waiting
shards   DTensors: the part that lies here, and which part of the whole it is
"""

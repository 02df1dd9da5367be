"""Models whose weights are spread over the ranks of torch.distributed: what is particular to them.

ranks        which rank this process is, and how to wait for the others
shards       DTensors: the part that lies here, and which part of the whole it is
agreement    that all ranks compile the same, or say so instead of waiting for each other
"""

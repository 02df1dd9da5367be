"""Models whose weights are sharded over the ranks of torch.distributed.

ranks    this process's rank; checks that all ranks compile the same, instead of deadlocking
shards   DTensors: the local shard, and its position in the full tensor
"""

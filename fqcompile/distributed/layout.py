"""Which part of a whole tensor each rank of a mesh holds."""

from dataclasses import dataclass

from torch import Tensor

from fqcompile.distributed.shards import is_dtensor, is_part, local_part
from fqcompile.errors import ShardingError

Run = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """One dimension of a tensor, over several holders.

    Attributes:
        runs: by holder, the (start, stop) of what it has, in its order.
        own: the number of the holder that this process is.
        leads: no rank before this one holds the same.
    """

    dim: int
    runs: tuple[tuple[Run, ...], ...]
    own: int
    leads: bool = True


def layout_of(tensor: Tensor) -> Layout | None:
    """How a DTensor is spread; None where this rank holds all of it.

    Raises:
        ShardingError: over more than one dimension of its mesh, or in a way that is not known here.
    """
    if not is_dtensor(tensor) or not is_part(tensor):
        return None
    spread = [(i, p) for i, p in enumerate(tensor.placements) if not p.is_replicate()]
    (mesh_dim, placement), *others = spread
    if others or not hasattr(placement, "dim"):
        raise ShardingError(
            f"a tensor {tuple(tensor.shape)} lies as {tensor.placements}; known are shards along "
            "one dimension of the mesh: redistribute it"
        )
    dim, holders = placement.dim % tensor.dim(), tensor.device_mesh.size(mesh_dim)
    pieces = _chunks((0, tensor.shape[dim]), getattr(placement, "split_factor", 1))
    chunked = [_chunks(piece, holders) for piece in pieces]
    runs = tuple(tuple(chunks[i] for chunks in chunked) for i in range(holders))
    own = tensor.device_mesh.get_local_rank(mesh_dim)
    here, told = local_part(tensor).shape[dim], sum(stop - start for start, stop in runs[own])
    if here != told:
        raise ShardingError(
            f"a tensor {tuple(tensor.shape)} as {tensor.placements} should have {told} of its "
            f"dimension {dim} on this rank, and has {here}: redistribute it"
        )
    here_at = tensor.device_mesh.get_coordinate() or ()
    copies = [at for i, at in enumerate(here_at) if i != mesh_dim]
    return Layout(dim, runs, own, leads=not any(copies))


def _chunks(run: Run, count: int) -> list[Run]:
    """As torch.chunk cuts it, with empty ones in place of those that it leaves out."""
    start, stop = run
    size = -(-(stop - start) // count)
    return [(min(start + i * size, stop), min(start + (i + 1) * size, stop)) for i in range(count)]

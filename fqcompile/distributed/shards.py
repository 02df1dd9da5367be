"""DTensors: the local shard, its version, and the part that each rank of a mesh holds.

A process that has not imported torch.distributed.tensor has no DTensors and need not import it.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

from fqcompile.distributed.ranks import Team, world_size
from fqcompile.errors import ShardingError
from fqcompile.torch_compat import count_of_writes, count_write, held_here

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Attribute of a DTensor: the version that its part was told of. With a weak reference in its place
# Module.to could not exchange the tensor.
_VERSION = "_fqcompile_version"
NOT_LOCAL = (
    "a DTensor that the graph reads by other means than to_local() and linears which each rank can "
    "compute from its own part"
)


def is_dtensor(value: object) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor; Dynamo's fake DTensors count."""
    library = sys.modules.get("torch.distributed.tensor")
    return library is not None and isinstance(value, library.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, the same object each time; any other tensor unchanged."""
    return held_here(tensor) if is_dtensor(tensor) else tensor


def with_part(tensor: Tensor, part: Tensor) -> Tensor:
    """A DTensor placed like `tensor`, with `part` as local shard; for a plain tensor, `part`."""
    if not is_dtensor(tensor):
        return part
    return type(tensor).from_local(
        part,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def is_part(tensor: object) -> bool:
    """Whether other ranks hold other parts of it."""
    return is_dtensor(tensor) and not all(p.is_replicate() for p in tensor.placements)


def version(tensor: Tensor) -> int:
    """The number of in-place changes; 0 if PyTorch does not count them."""
    return 0 if tensor.is_inference() else count_of_writes(tensor)


def note_updates(tensors: Sequence[Tensor]) -> None:
    """Apply in-place updates of DTensors to the versions of their local shards.

    An operation on a DTensor increments its own version, but not that of the shard it changes.
    """
    for tensor in tensors:
        part, known = local_part(tensor), vars(tensor).get(_VERSION)
        if known is not None and known != version(tensor) and not part.is_inference():
            count_write(part)
        vars(tensor)[_VERSION] = version(tensor)


def partial_sum() -> Any:
    """The placement of a tensor of which each rank has one summand, where there are DTensors."""
    return sys.modules["torch.distributed.tensor"].Partial()


def rank_groups(values: Iterable[Any]) -> list[tuple[int, ...]]:
    """The ranks of each mesh over which values are placed, sorted, without duplicates."""
    meshes = [value.device_mesh for value in values if is_dtensor(value)]
    return sorted({tuple(sorted(mesh.mesh.flatten().tolist())) for mesh in meshes})


def refuse_fsdp_modules(model: nn.Module) -> None:
    """Refuse models wrapped by FSDP.

    Raises:
        ShardingError: FSDP wraps the model or a part of it.
    """
    library = sys.modules.get("torch.distributed.fsdp")
    if library is None:
        return
    wrappers = (library.FSDPModule, library.FullyShardedDataParallel)
    for prefix, module in model.named_modules():
        if isinstance(module, wrappers):
            names = (f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters())
            raise ShardingError(fsdp_refusal(next(names, prefix or type(module).__name__)))


def fsdp_refusal(name: str) -> str:
    """Why weights under FSDP are not quantized, and what to do instead."""
    return (
        f"{name} is a weight that FSDP spreads over ranks and gathers for each call, in new memory "
        "each time: it could only be quantized again and again, and the codes would be whole on "
        "every rank. For inference shard by tensor parallel (parallelize_module, or "
        "tp_plan='auto' of Hugging Face) or expert parallel; or quantize the plain model with "
        "fqcompile.quantize_ and run it on each rank, as int4 is a quarter of its size"
    )


def team_of(tensors: Iterable[Tensor]) -> Team:
    """The ranks over which the tensors are sharded; only this one if none is.

    Raises:
        ShardingError: they are sharded over several sets of ranks, none of which has all ranks.
    """
    found = list(tensors)
    groups = rank_groups(found)
    if not groups:
        return Team()
    if tuple(range(world_size())) in groups:
        return Team(range(world_size()))
    (ranks, *others), mesh = groups, next(t.device_mesh for t in found if is_dtensor(t))
    if others or mesh.ndim > 1:
        raise ShardingError(
            f"the model lies on the ranks {groups}; known are meshes of one dimension, or one over "
            "all ranks"
        )
    return Team(ranks, mesh.get_group())


Run = tuple[int, int]


@dataclass(frozen=True)
class Sharding:
    """The sharding of one dimension of a tensor over several holders.

    Attributes:
        runs: per holder, the (start, stop) ranges that it holds, in order.
        own: the index of this process among the holders.
        leads: no lower rank holds the same shard.
    """

    dim: int
    runs: tuple[tuple[Run, ...], ...]
    own: int
    leads: bool = True


def sharding_of(tensor: Tensor) -> Sharding | None:
    """The sharding of a DTensor; None if this rank holds all of it.

    Raises:
        ShardingError: it is sharded over several dimensions of its mesh, or in an unsupported way.
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
    return Sharding(dim, runs, own, leads=not any(copies))


def _chunks(run: Run, count: int) -> list[Run]:
    """The ranges of torch.chunk, followed by empty ones for the chunks that it omits."""
    start, stop = run
    size = -(-(stop - start) // count)
    return [(min(start + i * size, stop), min(start + (i + 1) * size, stop)) for i in range(count)]

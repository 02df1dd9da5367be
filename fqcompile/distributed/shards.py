"""DTensors: the tensor that lies on this rank, and its version.

A process that never imported torch.distributed.tensor has none, and need not import it.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
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
    """Whether it is a tensor over several ranks; Dynamo's fake ones count."""
    library = sys.modules.get("torch.distributed.tensor")
    return library is not None and isinstance(value, library.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor: the same object each time; any other tensor itself."""
    return held_here(tensor) if is_dtensor(tensor) else tensor


def with_part(tensor: Tensor, part: Tensor) -> Tensor:
    """A DTensor that lies as `tensor` does, with this part here; for a plain tensor the part."""
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
    """Whether other ranks hold more of it."""
    return is_dtensor(tensor) and not all(p.is_replicate() for p in tensor.placements)


def version(tensor: Tensor) -> int:
    """How often it was changed in place; 0 where that is not counted."""
    return 0 if tensor.is_inference() else count_of_writes(tensor)


def note_updates(tensors: Sequence[Tensor]) -> None:
    """Carry in-place updates of DTensors over to the versions of their local parts.

    An operation on a DTensor counts its version up, and not that of the part that it changes.
    """
    for tensor in tensors:
        part, known = local_part(tensor), vars(tensor).get(_VERSION)
        if known is not None and known != version(tensor) and not part.is_inference():
            count_write(part)
        vars(tensor)[_VERSION] = version(tensor)


def partial_sum() -> Any:
    """The placement of a tensor of which each rank has one summand, where there are DTensors."""
    return sys.modules["torch.distributed.tensor"].Partial()


def from_local() -> Callable[..., Any]:
    """What makes a DTensor of the ranks' parts, where there are DTensors."""
    made: Callable[..., Any] = sys.modules["torch.distributed.tensor"].DTensor.from_local
    return made


def rank_groups(values: Iterable[Any]) -> list[tuple[int, ...]]:
    """The ranks of each mesh that some of the values lie on, sorted, without repetition."""
    meshes = [value.device_mesh for value in values if is_dtensor(value)]
    return sorted({tuple(sorted(mesh.mesh.flatten().tolist())) for mesh in meshes})


def refuse_fsdp_modules(model: nn.Module) -> None:
    """Raise where FSDP wraps the model or a part of it.

    Raises:
        ShardingError: it does.
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
    """Why weights under FSDP are not quantised, and what to do instead."""
    return (
        f"{name} is a weight that FSDP spreads over ranks and gathers for each call, in new memory "
        "each time: it could only be quantised again and again, and the codes would be whole on "
        "every rank. For inference shard by tensor parallel (parallelize_module, or "
        "tp_plan='auto' of Hugging Face) or expert parallel; or quantise the plain model with "
        "fqcompile.quantize_ and run it on each rank, as int4 is a quarter of its size"
    )


def team_of(tensors: Iterable[Tensor]) -> Team:
    """The ranks over which some of the tensors are spread; this one alone where none is.

    Raises:
        ShardingError: they are spread over several sets of ranks, none of which is all there are.
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

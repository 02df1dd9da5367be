"""refresh: what was made of a model's weights is stale; the next call makes it again."""

from collections.abc import Iterator

from torch import Tensor, nn

from fqcompile.distributed.shards import local_part
from fqcompile.errors import FineQuantError
from fqcompile.weights.dispatch import start_again
from fqcompile.weights.store import STORE


def refresh(model: nn.Module) -> None:
    """Say that weights of a compiled model were changed in a way that PyTorch does not see.

    That is a write through `weight.data`, as peft's `merge_adapter` and `unmerge_adapter` make, one
    by other code than PyTorch's, and any to a tensor made in inference mode. The next call of each
    graph that reads them quantises them as they are then, also with `weight_updates="ignore"`, and
    also those that were left as they are since they changed in every call.

    Raises:
        FineQuantError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise FineQuantError(
            f"refresh takes the nn.Module whose weights were written to, not {type(model).__name__}"
        )
    weights = list(_tensors(model))
    STORE.forget(weights)
    start_again(weights)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and attributes of it and of all modules in it."""
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            yield from (local_part(t) for t in held.values() if isinstance(t, Tensor))

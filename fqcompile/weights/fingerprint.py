"""What tells that a weight is not what it was: versions and addresses, and its content.

Versions and addresses are compared on every call. They do not see a write through `.data`, which a
digest of the content does; that is compared when a graph meets a weight for the first time.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from fqcompile.torch_compat import count_of_writes, is_expired
from fqcompile.weights.content_digest import content_digest, mixed_sum
from fqcompile.weights.memory import NoMemory
from fqcompile.weights.parameter import PackedWeight

Fingerprint = tuple[tuple[int, ...], tuple[int, ...]]

# What is made of a weight is made again where the weight has changed meanwhile, so often at most.
ATTEMPTS = 3


def fingerprint(weights: tuple[Tensor, ...]) -> Fingerprint:
    """What changes when a weight is updated in place or given other storage: versions, addresses.

    Runs on every call of a compiled graph: 27 us for 224 weights. PyTorch counts a version up when
    a write has ended, so what was read of a weight meanwhile is seen to be stale after it.
    """
    try:
        return tuple(map(count_of_writes, weights)), tuple(map(Tensor.data_ptr, weights))
    except RuntimeError:
        return tuple(map(_version_or_0, weights)), tuple(map(_address_or_0, weights))


def _version_or_0(weight: Tensor) -> int:
    """Tensors made in inference mode keep no version."""
    return 0 if weight.is_inference() else count_of_writes(weight)


def _address_or_0(weight: Tensor) -> int:
    """Sparse tensors, which are never quantised, have no one address."""
    return weight.data_ptr() if weight.layout is torch.strided else 0


class Memory:
    """The memory of weights, which it does not keep alive.

    New memory may lie where the old lay, as after `p.data = torch.empty(0); p.data = new`: the
    fingerprint is the same, but the old memory has gone.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        plain = (w for w in weights if not isinstance(w, NoMemory) and w.layout is torch.strided)
        self._references = [StorageWeakRef(w.untyped_storage()) for w in plain]
        self._places = [reference.cdata for reference in self._references]

    def gone(self) -> bool:
        """Whether that of some weight was given back. 8 us for 224 weights."""
        return any(map(is_expired, self._places))


def _count_fused_steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Kernels of fused optimizers write to parameters without counting their versions up."""
    if torch.compiler.is_compiling():
        return
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(
                [p for p in group["params"] if not p.is_inference()]
            )


register_optimizer_step_post_hook(_count_fused_steps)


class Values(NamedTuple):
    """The values of a weight: equal ones are the same values in the same place."""

    fingerprint: Fingerprint
    digest: str


def values_of(weight: Tensor) -> Values:
    """The fingerprint first: a write that ends between the two makes the next one unequal."""
    state = fingerprint((weight,))
    if isinstance(weight, PackedWeight):  # has its codes; nothing is made of its values
        return Values(state, "")
    if weight.device.type == "cpu" and weight.dim() in (2, 3):
        return Values(state, content_digest(weight))
    return Values(state, f"{weight.dtype} {tuple(weight.shape)} {mixed_sum(weight)}")

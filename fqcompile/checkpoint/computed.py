"""What constructors compute on the CPU from a config, bounded before memory is taken for it.

A model on the meta device has no values, but for what its constructor computes elsewhere, rotary
frequencies for one: numbers whose size the config alone decides, and no file justifies.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fqcompile.errors import CheckpointError
from fqcompile.torch_compat import TorchDispatchMode, schema_of, tree_iter, tree_map_only

_MOST = 4 << 30  # bytes, all tensors together: far more than models compute
_UNKNOWN = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class BoundedComputing(TorchDispatchMode):
    """This thread raises where its operators would make more than `_MOST` bytes on the CPU.

    Operators whose results are as large as their values say are not counted: they return no more
    than a few times their inputs.
    """

    def __init__(self, where: object) -> None:
        """`where` is the directory whose config it is, for errors."""
        super().__init__()
        self.where, self.made = where, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """As it would be without this.

        Raises:
            CheckpointError: it would be too much.
        """
        kwargs = kwargs or {}
        if _computes(func, args, kwargs):
            self.made += _bytes(func, args, kwargs)
            if self.made > _MOST:
                raise CheckpointError(
                    f"{self.where}: its config asks for {self.made} bytes that no file holds and "
                    f"that the model's class computes; at most {_MOST} are made: is config.json "
                    "that of another model?"
                )
        return func(*args, **kwargs)


def _computes(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether it takes memory on the CPU, of a size that is known before."""
    if _UNKNOWN & set(func.tags) or any(r.alias_info for r in schema_of(func).returns):
        return False
    device = kwargs.get("device")
    if device is not None:
        return torch.device(device).type == "cpu"
    tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors:
        return _takes_device(func)
    return any(tensor.device.type == "cpu" for tensor in tensors)


def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in schema_of(func).arguments)


def _bytes(func: Any, args: Any, kwargs: Any) -> int:
    """Of the result, told on the meta device."""
    args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
    device = {"device": torch.device("meta")} if _takes_device(func) else {}
    found = func(*args, **{**kwargs, **device})
    return sum(leaf.nbytes for leaf in tree_iter(found) if isinstance(leaf, Tensor))

"""Run a model on data, or on random token ids, and collect the inputs of its weights."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fqcompile.modules.inputs import Collect, WeightInputs
from fqcompile.modules.weights import ModuleWeight
from fqcompile.quant.calibration import fixed_random_numbers
from fqcompile.torch_compat import plain_module


def collect_inputs(
    model: nn.Module,
    batches: Iterable[object],
    weights: Iterable[ModuleWeight],
    collect: Collect,
) -> None:
    """Call `collect(weight, expert, x)` for each product of a weight while the batches run.

    x is [..., K]; of a matrix the expert is 0. What runs is a copy of the model that has its
    parameters alone, in evaluation mode: buffers, caches, counters and hooks' state stay as they
    are, and so do random numbers.

    Args:
        batches: what the model is called with: a tensor, a dict of keyword arguments, or a tuple
            or list of positional ones.
        weights: of this model; those of other names are not told.
    """
    found = list(weights)
    own = _copy(plain_module(model)).eval()
    devices = {weight.weight.device for weight in found}
    with fixed_random_numbers(devices), WeightInputs(found, collect):
        for batch in batches:
            _call(own, batch)


def _copy(model: nn.Module) -> nn.Module:
    """With the same parameters, and copies of all else that a call may write to."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _call(model: nn.Module, batch: object) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


def batches_of(calibration: Any) -> Iterator[object]:
    """The batches in what a user gives: a tensor or dict is one, of anything else each item."""
    return iter([calibration] if isinstance(calibration, Tensor | Mapping) else calibration)

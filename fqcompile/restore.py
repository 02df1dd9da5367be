"""restore: the originals that `free_weights` released, as far as they can come back."""

from torch import nn

from fqcompile.weights.freed import is_freed
from fqcompile.weights.release import restore_weight


def restore(model: nn.Module) -> nn.Module:
    """Give each freed parameter of `model` its dequantised value, in place; return `model`.

    The parameters stay the same objects and become ordinary ones, with requires_grad as it was: the
    model runs eagerly, is saved and copied as any other. Compiled graphs go on with the same packed
    weights and free these parameters no more. Needs the memory that freeing them has saved.
    """
    for weight in model.parameters():
        if is_freed(weight):
            restore_weight(weight)
    return model

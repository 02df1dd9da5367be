"""restore: dense weights again, as far as they can come back."""

from torch import Tensor, nn

from fqcompile.distributed.shards import local_part, with_part
from fqcompile.weights.freed import is_freed
from fqcompile.weights.packed_weight import PackedWeight
from fqcompile.weights.release import restore_weight


def restore(model: nn.Module) -> nn.Module:
    """Give each freed or packed parameter its dequantised values, in place; return `model`.

    What `free_weights` has released stays the same parameter object, with requires_grad as it was;
    what `quantize_` or `load` has packed is replaced by an ordinary parameter. The model runs
    eagerly, is saved and copied as any other. Compiled graphs go on with the same packed weights
    and free these parameters no more. Needs the memory that was saved.
    """
    for weight in model.parameters():
        if is_freed(weight):
            restore_weight(weight)
    dense: dict[Tensor, nn.Parameter] = {}  # a tied weight stays tied
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            packed = local_part(weight)
            if isinstance(packed, PackedWeight):
                if weight not in dense:
                    values = with_part(weight, packed.dequantized().contiguous())
                    dense[weight] = nn.Parameter(values, False)
                setattr(module, name, dense[weight])
    return model

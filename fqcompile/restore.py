"""restore: dense weights in place of packed ones."""

from torch import Tensor, nn

from fqcompile.distributed.shards import local_part, with_part
from fqcompile.weights.parameter import PackedWeight


def restore(model: nn.Module) -> nn.Module:
    """Replace each packed parameter by an ordinary one with its dequantized values; return `model`.

    The model then runs, is saved and copied as any other. Needs the memory that packing saved.
    """
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

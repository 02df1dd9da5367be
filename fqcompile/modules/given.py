"""What functions check of the model that they are given, before they change or write anything."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fqcompile.distributed.shards import local_part, refuse_fsdp_modules
from fqcompile.errors import CheckpointError, FineQuantError, OptionError
from fqcompile.files.safetensors_file import DTYPE_NAMES
from fqcompile.files.untrusted import check_name
from fqcompile.quant.checks import NO_VALUES
from fqcompile.weights.parameter import PackedWeight


def check_model(model: object, function: str) -> None:
    """Check the model that a function of this name was given.

    Raises:
        OptionError: it is no model.
    """
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise OptionError(
            f"{function} got {found:.80} in place of a model; give an nn.Module that is loaded, as "
            "from_pretrained or fqcompile.load returns it"
        )


def check_quantizable(model: nn.Module) -> None:
    """Check the model that `quantize_` was given.

    Raises:
        OptionError: it is no model.
        ShardingError: FSDP wraps the model or a part of it.
    """
    check_model(model, "quantize_")
    refuse_fsdp_modules(model)


def check_restorable(model: nn.Module) -> None:
    """Check the model that `restore` was given.

    Raises:
        OptionError: it is no model.
        FineQuantError: a packed weight is on the meta device. Its values may be with a hook that
            puts them there for each call, and would do so with the packed ones ever after.
    """
    check_model(model, "restore")
    for name, weight in model.named_parameters():
        if weight.is_meta and isinstance(local_part(weight), PackedWeight):
            raise FineQuantError(f"{name} cannot be restored: it is {NO_VALUES}")


def check_savable(model: nn.Module, parts: Mapping[str, Tensor]) -> None:
    """Check the model that `save` was given, of which these tensors are here.

    Raises:
        CheckpointError: no weight is packed, a tensor cannot be written, or a module has more.
    """
    if not any(isinstance(part, PackedWeight) for part in parts.values()):
        raise CheckpointError(
            "the model has no packed weight: call fqcompile.quantize_(model) first, or save it "
            "with torch.save or save_pretrained"
        )
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"module {name or 'itself'} ({type(module).__name__}) has extra state, which no "
                "tensor holds; keep it as a buffer to save it"
            )
    for name, part in parts.items():
        check_name(name, "the model")
        reason = _unsavable(part)
        if reason is not None:
            raise CheckpointError(f"{name} cannot be saved: {reason}")


def _unsavable(tensor: Tensor) -> str | None:
    packed = isinstance(tensor, PackedWeight)
    if not packed and type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"it is a {type(tensor).__name__}; replace it by a plain tensor"
    if tensor.is_meta:
        return f"it is {NO_VALUES}"
    if packed:
        return None
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return f"it is {tensor.layout} or quantized by PyTorch; make it dense"
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        return "its memory was freed by resizing its storage; give it values first"
    if tensor.dtype not in DTYPE_NAMES:
        return f"safetensors files have no {tensor.dtype}; cast it"
    return None

"""What other libraries are told of packed weights, so that their own functions take them.

Nothing here is imported by `import fqcompile`: each file needs its library, and registers with it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fqcompile.checkpoint.packed_record import METHOD, PackedRecord, described, read_packed, to_disk
from fqcompile.errors import CheckpointError, FineQuantError
from fqcompile.files.safetensors_file import TensorPlace
from fqcompile.hf_compat import untied_names
from fqcompile.weights.parameter import PackedWeight


def refuse_offloading(device_map: object) -> None:
    """Check a `device_map`: accelerate's hooks would move packed weights as plain tensors.

    Raises:
        FineQuantError: a part is to lie on the disk, or on the CPU beside an accelerator.
    """
    found = device_map.values() if isinstance(device_map, Mapping) else ()
    places = {str(place) for place in found}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise FineQuantError(
            f"device_map puts parts on {', '.join(sorted(places))}, and packed weights cannot "
            "be offloaded: give a map of accelerators only, or of the CPU only; with "
            "device_map='auto', leave the CPU out of max_memory"
        )


def packed_files(
    files: Sequence[str],
) -> tuple[dict[str, TensorPlace], dict[str, PackedRecord]]:
    """What `read_packed` finds in the files that `from_pretrained` is about to read.

    Raises:
        CheckpointError: they are no safetensors files, are damaged, or have no packed weight.
    """
    if not files or not all(file.endswith(".safetensors") for file in files):
        raise CheckpointError(
            f"config.json says that weights are packed by {METHOD}, and safetensors files hold "
            "these: give from_pretrained their directory, and no state_dict"
        )
    return read_packed(map(Path, files))


def in_files(
    named: Mapping[str, Tensor], model: object = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict with codes and scales in place of packed weights, and a file's metadata.

    `model`: whose class ties some of the names.

    Raises:
        FineQuantError: no weight is packed.
    """
    packed = {name: tensor for name, tensor in named.items() if isinstance(tensor, PackedWeight)}
    if not packed:
        raise FineQuantError(
            "no weight of the model is packed, and its config says that they are: call "
            "model.dequantize() to save it dense, or fqcompile.quantize_(model)"
        )
    roots = {name: tensor.memory.root for name, tensor in packed.items()}
    alone = untied_names(model, roots.items())
    state: dict[str, Tensor] = {}
    records: dict[str, PackedRecord] = {}
    written = set()
    for name, tensor in named.items():
        weight = packed.get(name)
        if weight is None:
            state[name] = tensor
        elif name in alone or id(roots[name]) not in written:
            records[name], tensors = to_disk(name, weight.quantized(), weight.dtype)
            state |= {n: t.clone() for n, t in tensors.items()} if name in alone else tensors
            written.add(id(roots[name]))
    return state, described(records)

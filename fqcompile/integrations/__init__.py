"""What other libraries are told of packed weights, so that their own functions take them.

Nothing here is imported by `import fqcompile`: each file needs its library, and registers with it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fqcompile.checkpoint.packed_record import METHOD, PackedRecord, described, read_packed, to_disk
from fqcompile.errors import CheckpointError, FineQuantError
from fqcompile.files.safetensors_file import TensorPlace
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
) -> tuple[Mapping[str, TensorPlace], Mapping[str, PackedRecord]]:
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


def in_files(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict with codes and scales in place of packed weights, and a file's metadata."""
    state: dict[str, Tensor] = {}
    records: dict[str, PackedRecord] = {}
    roots = set()
    for name, tensor in named.items():
        if not isinstance(tensor, PackedWeight):
            state[name] = tensor
        elif id(tensor.memory.root) not in roots:  # tied names share it
            roots.add(id(tensor.memory.root))
            records[name], tensors = to_disk(name, tensor.quantized(), tensor.dtype)
            state |= tensors
    return state, described(records)

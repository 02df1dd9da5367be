"""The ways of `bench export`, each run in a process of its own: prints what it took as JSON."""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

import fqcompile
from bench.core import processes
from bench.core.results import Row
from bench.core.shapes import STARTED, build
from fqcompile.checkpoint.manifest import read_manifest
from fqcompile.checkpoint.shards import MappedShards
from fqcompile.quant.quantized_weight import QuantizedWeight

# Directories below the folder that a run works in.
PLAIN, SAVED = "plain", "saved"
HEADS = ["lm_head"]  # which no engine takes packed


def make(folder: Path, size: str, layers: int) -> None:
    """A checkpoint of Hugging Face with random weights, and the same quantised."""
    build(size, layers).save_pretrained(folder / PLAIN, max_shard_size="1GB")  # type: ignore[operator]
    fqcompile.quantize_checkpoint(folder / PLAIN, folder / SAVED, exclude=HEADS)


# What reads one directory and writes another, or only reads.
WAYS: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "export, quantising": (PLAIN, lambda source, out: fqcompile.export(source, out)),
    "export, portable": (SAVED, lambda source, out: fqcompile.export(source, out)),
    "export, serve": (SAVED, lambda source, out: fqcompile.export(source, out, profile="serve")),
    "check": ("export, serve", lambda source, _: fqcompile.check(source)),
    "load": ("export, serve", lambda source, _: fqcompile.load(None, source)),
}


def took(way: str, folder: Path) -> Row:
    """Seconds, bytes of the source and of what is written, and the peak beyond imports."""
    source, run = WAYS[way]
    out = folder / way
    shutil.rmtree(out, ignore_errors=True)
    processes.settle()
    imports, own = processes.resident(), processes.anonymous()
    processes.reset_peak()
    start = time.perf_counter()
    kept = run(folder / source, out)
    seconds = time.perf_counter() - start
    row: Row = {"seconds": seconds, "peak": processes.peak() - imports, "imports": imports}
    row |= {"read": size_of(folder / source), "written": size_of(out) if out.exists() else 0}
    row["own"] = processes.anonymous() - own
    del kept
    return row


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def compared(way: str, folder: Path) -> Row:
    """How many exported layers have the codes and scales of the saved model, and how many not."""
    manifest = read_manifest(folder / SAVED)
    shards = MappedShards(folder / SAVED, manifest, verify=False)
    equal = different = 0
    for path in sorted((folder / way).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if not key.endswith(".weight_packed"):
                    continue
                name = key.removesuffix("_packed")
                weight = shards.packed(manifest.packed[name])
                words, own = file.get_tensor(key), file.get_tensor(f"{name}_scale")
                same = _same_codes(words, weight.qweight) and _same_scales(own, weight)
                equal, different = equal + same, different + (not same)
    return {"equal": equal, "different": different}


def _same_codes(words: Tensor, codes: Tensor) -> bool:
    """Four bits are the same bytes; eight bits differ by their sign's."""
    found = words.view(torch.uint8)
    expected = codes if codes.dtype == torch.uint8 else codes.view(torch.uint8) ^ 0x80
    return torch.equal(found, expected)


def _same_scales(own: Tensor, weight: QuantizedWeight) -> bool:
    return torch.equal(
        own, weight.scale.repeat_interleave(own.shape[1] // weight.scale.shape[1], 1)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("make", "took", "compared"))
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--size", choices=STARTED, default="llama")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    row: Row = {}
    if arguments.what == "make":
        make(arguments.folder, arguments.size, arguments.layers)
    else:
        run = took if arguments.what == "took" else compared
        row = run(arguments.way, arguments.folder)
    print(json.dumps(row))


if __name__ == "__main__":
    main()

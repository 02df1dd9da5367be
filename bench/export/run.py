"""Speed and memory of exporting to compressed-tensors, of the checker, and of opening the result.

    python -m bench export [--size llama|tiny] [--layers 6] [--way NAME ...] [--json FILE]

A checkpoint in the shape of Llama 3 8B with 6 layers has 1.6 billion weights, 3.1 GB in bf16; it
and the same model quantized are made first. Each way is a process of its own. Then every exported
layer's codes and scales are compared with the quantized model's: a row whose layers differ fails.

    read, written    bytes of safetensors files
    peak             the most that was resident, mapped files included, beyond what imports took
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

import fqcompile
from bench.core import processes
from bench.core.processes import in_fresh_process
from bench.core.results import Results, Row, failure
from bench.core.section import show
from bench.core.shapes import STARTED, build
from bench.export import section
from fqcompile.checkpoint.manifest import read_manifest
from fqcompile.checkpoint.shards import MappedShards
from fqcompile.kernels.tuning.measure import WrongResult
from fqcompile.tensor.quantized import QuantizedTensor

_SPACE = 4  # times the model in bf16: itself, quantized twice, exported twice
_BYTES_PER_LAYER = 440_000_000
# Directories below the folder that a run works in.
PLAIN, SAVED = "plain", "saved"
HEADS = ["lm_head"]  # which no engine takes packed


def make(folder: Path, size: str, layers: int) -> None:
    """A checkpoint of Hugging Face with random weights, and the same quantized."""
    build(size, layers).save_pretrained(folder / PLAIN, max_shard_size="1GB")  # type: ignore[operator]
    fqcompile.quantize_checkpoint(folder / PLAIN, folder / SAVED, exclude=HEADS, levels="uniform")


# What reads one directory and writes another, or only reads.
WAYS: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "export, quantizing": (PLAIN, lambda source, out: fqcompile.export(source, out)),
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


def _same_scales(own: Tensor, weight: QuantizedTensor) -> bool:
    return torch.equal(
        own, weight.scale.repeat_interleave(own.shape[1] // weight.scale.shape[1], 1)
    )


def measured(way: str, folder: Path, flags: Sequence[str]) -> Row:
    """The way's row.

    Raises:
        WrongResult: an exported layer is not the quantized one.
    """
    own = [*flags, "--folder", str(folder), "--way", way]
    row = _apart("took", own)
    if row["written"]:
        row |= _apart("compared", own)
        if row["different"] or not row["equal"]:
            raise WrongResult(f"{row['different']} of {row['equal'] + row['different']} layers")
    return row


def _apart(what: str, flags: Sequence[str]) -> Row:
    return in_fresh_process("bench.export.run", ["--here", what, *flags])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench export", description=__doc__)
    parser.add_argument("--size", choices=STARTED, default="llama")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--way", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where to work, on a disk with room")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--here", choices=("make", "took", "compared"), help="print what it took")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> Results:
    results = Results.of(arguments, torch.device("cpu"))
    flags = ["--size", arguments.size, "--layers", str(arguments.layers)]
    flags += ["--threads", str(arguments.threads)]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        _check_space(folder, arguments)
        _apart("make", [*flags, "--folder", name])
        for way in tqdm(arguments.way, "ways", disable=None):
            row: Row = {"way": way}
            try:
                row |= measured(way, folder, flags)
            except Exception as error:
                row["failure"] = failure(error)
            results.add(row)
    return results


def _check_space(folder: Path, arguments: argparse.Namespace) -> None:
    needed = _SPACE * arguments.layers * _BYTES_PER_LAYER
    free = shutil.disk_usage(folder).free
    if arguments.size == "llama" and free < needed:
        raise SystemExit(f"{folder} has {free / 1e9:.0f} GB free; {needed / 1e9:.0f} are needed")


def _here(arguments: argparse.Namespace) -> Row:
    torch.set_num_threads(arguments.threads)
    if arguments.here == "make":
        make(arguments.folder, arguments.size, arguments.layers)
        return {}
    one = took if arguments.here == "took" else compared
    return one(arguments.way[0], arguments.folder)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.here:
        print(json.dumps(_here(arguments)))
    else:
        show(run(arguments), section.export)


if __name__ == "__main__":
    main()

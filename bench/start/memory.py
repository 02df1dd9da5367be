"""Memory of a model from loading to its first result: peak and resident, way by way.

    python -m bench memory [--size llama|tiny] [--layers 2] [--way NAME ...] [--json FILE]

A Llama of hidden size 4096 with random bf16 weights, 1.4 GB with 2 layers and its head, and a
prompt of 16 tokens. Each way is a process of its own, in which the model is made first, as a
checkpoint would be loaded; "load" has no such model, it reads a directory that another process has
saved. What is added by importing is taken off. Inductor's caches are filled by a first process that
is not measured, for what its compilation takes depends on the machine; weights are quantized anew.

    loaded     bytes resident when the model is there
    peak       the most that was resident from then on to the first result; of "load" from its start
    after      resident when garbage is gone; "own" is that without pages that are a file's
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import fqcompile
from bench.core import processes
from bench.core.measure import same_logits
from bench.core.processes import in_fresh_process
from bench.core.results import Results, Row, failure
from bench.core.section import show
from bench.core.shapes import STARTED, build, prompt
from bench.start.section import PLAIN
from bench.start.section import memory as section

Compiled = Callable[..., Any]

SAVE = "save"
# The head too, as torchao has it, where ours would by itself have 8 bits.
GROUP = 128
OPTIONS: dict[str, Any] = {"granularity": GROUP, "overrides": {"lm_head": {"bits": 4}}}


def _finequant(model: nn.Module) -> Compiled:
    return torch.compile(model, backend="finequant", dynamic=False, options=OPTIONS)


def _quantized_in_place(model: nn.Module) -> Compiled:
    fqcompile.quantize_(model, **OPTIONS)
    return torch.compile(model, dynamic=False)


def _torchao(model: nn.Module) -> Compiled:
    """Its int4 for CPUs (0.18), in groups of the same size."""
    if find_spec("torchao") is None:
        raise SystemExit("torchao is not installed")
    forms = import_module("torchao.prototype.quantization.int4")
    config = forms.PrototypeInt4WeightOnlyConfig(group_size=GROUP)
    import_module("torchao.quantization").quantize_(model, config)
    return torch.compile(model, dynamic=False)


# From the model in bf16 to what is called.
OF_A_MODEL: dict[str, Callable[[nn.Module], Compiled]] = {
    PLAIN: lambda model: torch.compile(model, dynamic=False),
    "finequant": _finequant,
    "quantize_": _quantized_in_place,
    "torchao": _torchao,
}
# From the directory that SAVE has written.
SAVED: dict[str, Callable[[Callable[[], nn.Module], Path], Compiled]] = {
    "load": lambda empty, saved: torch.compile(fqcompile.load(empty, saved), dynamic=False),
}
WAYS = (*OF_A_MODEL, *SAVED)
_OURS = [way for way in WAYS if way not in (PLAIN, "torchao")]


def save(size: str, layers: int, saved: Path) -> None:
    model = build(size, layers)
    fqcompile.quantize_(model, **OPTIONS)
    fqcompile.save(model, saved)


@torch.no_grad()
def took(way: str, size: str, layers: int, saved: Path) -> Row:
    """Bytes beyond those that importing took, and the last token's first logits."""
    processes.settle()
    imports = processes.resident()
    own = processes.anonymous()
    processes.reset_peak()
    if way in SAVED:
        compiled = SAVED[way](partial(build, size, layers, device="meta"), saved)
        loaded = processes.resident()
    else:
        model = build(size, layers)
        processes.settle()
        loaded = processes.resident()
        processes.reset_peak()
        compiled = OF_A_MODEL[way](model)
    logits = compiled(prompt(size), use_cache=False).logits[0, -1, :256].tolist()
    peak = processes.peak()
    processes.settle()
    bytes_now = {"loaded": loaded, "peak": peak, "after": processes.resident()}
    row: Row = {key: value - imports for key, value in bytes_now.items()}
    row |= {"own": processes.anonymous() - own, "imports": imports}
    if way == "torchao":
        row["library"] = f"torchao {version('torchao')}"
    return row | {"ours": way in _OURS, "logits": logits}


def measured(way: str, arguments: argparse.Namespace, folder: Path) -> Row:
    """The way's row, from its second process; both write their caches below `folder`."""
    environment = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "FQCOMPILE_CACHE_SIZE": "0",
    }
    flags = ["--size", arguments.size, "--threads", str(arguments.threads)]
    flags += ["--layers", str(arguments.layers), "--saved", str(folder / "saved")]
    ways = [SAVE, way, way] if way in SAVED else [way, way]
    rows = [
        in_fresh_process("bench.start.memory", [*flags, "--here", name], environment)
        for name in ways
    ]
    return rows[-1]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench memory", description=__doc__)
    parser.add_argument("--size", choices=STARTED, default="llama")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--here", choices=(*WAYS, SAVE), help="run this one here, print its row")
    parser.add_argument("--saved", type=Path, help="what the way before has saved")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> Results:
    results = Results.of(arguments, torch.device("cpu"))
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for way in tqdm(arguments.way, "ways", disable=None):
            row: Row = {"way": way}
            try:
                row |= measured(way, arguments, Path(folder))
                found.append(same_logits(row, found, arguments.layers))
            except Exception as error:
                row = {"way": way, "failure": failure(error)}
            results.add({key: value for key, value in row.items() if key != "logits"})
    return results


def _here(arguments: argparse.Namespace) -> Row:
    torch.set_num_threads(arguments.threads)
    about = (arguments.size, arguments.layers, arguments.saved)
    if arguments.here == SAVE:
        save(*about)
        return {}
    return took(arguments.here, *about)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.here:
        print(json.dumps(_here(arguments)))
    else:
        show(run(arguments), section)


if __name__ == "__main__":
    main()

"""The ways of `bench memory`, each run in a process of its own: prints what it took as JSON."""

import argparse
import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fqcompile
from bench.core import processes
from bench.core.results import Row
from bench.core.shapes import STARTED, build, prompt
from bench.start.section import PLAIN

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=(*WAYS, SAVE))
    parser.add_argument("--size", choices=STARTED, default="llama")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--saved", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size, layers = arguments.size, arguments.layers
    if arguments.way == SAVE:
        save(size, layers, arguments.saved)
        print("{}")
    else:
        print(json.dumps(took(arguments.way, size, layers, arguments.saved)))


if __name__ == "__main__":
    main()

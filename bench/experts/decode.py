"""Decoding through one layer of experts on this CPU, against Inductor on the layer as it is.

    python -m bench expert_decode [--tokens 1,4] [--threads 2] [--json FILE]

The block of Qwen3-MoE (router, 64 experts of 2048 x 768, 8 for each token), compiled whole: ours,
and Inductor in bf16 and fp32, each with the experts as "batched_mm" and "grouped_mm". All run in
turn over inputs whose tokens choose other experts each time, so that weights come from memory, as
in a model; a figure is the median of one input, with the 20th and 80th percentile. What is timed is
first compared with the block under dequantized weights. Memory is what ours adds to the process
while it runs, packed weights included, over the packed size.
"""

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import fqcompile
from bench.core import processes
from bench.core.results import Results, Row, identity
from bench.core.section import show
from bench.experts import section
from fqcompile.weights.store import STORE

SHAPE = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 64}
TOP_K = 8
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORMS = ("batched_mm", "grouped_mm")
INPUTS, ROUNDS = 12, 9
# A unit of the result for each rounding (two products, the unit, the weighted sum), see tests.
ALLOWED = {torch.bfloat16: 8 * 2**-8, torch.float32: 4 * 2048 * 2.0**-24}


class Case(NamedTuple):
    """One compiled block."""

    dtype: str
    form: str
    ours: bool
    run: Callable[[Tensor], Tensor]


def blocks(dtype: torch.dtype) -> dict[str, nn.Module]:
    """The layer in each form, on the same random weights, which keep a value's size."""
    made: dict[str, nn.Module] = {}
    for form in FORMS:
        config = Qwen3MoeConfig(**SHAPE, num_experts_per_tok=TOP_K, norm_topk_prob=True)
        config._experts_implementation = form
        with torch.device("meta"):
            made[form] = Qwen3MoeSparseMoeBlock(config).to(dtype).eval().requires_grad_(False)
    first, *others = made.values()
    first.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    for other in others:
        other.load_state_dict(first.state_dict(), assign=True)
        _share_parameters(first, other)
    return made


def _share_parameters(source: nn.Module, target: nn.Module) -> None:
    """The same Parameter objects, so that they are quantized once."""
    for name, parameter in source.named_parameters():
        owner, _, attribute = name.rpartition(".")
        setattr(target.get_submodule(owner), attribute, parameter)


def output(block: Callable[..., Any], x: Tensor) -> Tensor:
    """Hidden states alone; some versions return the router's scores too."""
    with torch.no_grad():
        y = block(x)
    return y[0] if isinstance(y, tuple) else y


def cases(dtype: str, layers: Mapping[str, nn.Module], oracle: Tensor, x: Tensor) -> list[Case]:
    """Ours and Inductor's in both forms, compiled; ours held against `oracle`, its result for x."""
    found = []
    for form, plain in layers.items():
        compiled: Any = torch.compile(plain, fullgraph=True, dynamic=False)
        found.append(Case(dtype, form, False, lambda x, run=compiled: output(run, x)))
        ours: Any = torch.compile(plain, backend="finequant", fullgraph=True, dynamic=False)
        y = output(ours, x)
        error = float((y - oracle).abs().max() / oracle.abs().max())
        if error > ALLOWED[y.dtype]:
            raise SystemExit(f"{dtype} {form}: wrong by {error:.3g} of the largest result")
        found.append(Case(dtype, form, True, lambda x, run=ours: output(run, x)))
    return found


def dequantized(plain: nn.Module, x: Tensor) -> nn.Module:
    """The layer under its dequantized weights."""
    plan = fqcompile.explain(plain, x)
    return fqcompile.fake_quantize_(copy.deepcopy(plain), plan)


def timed(found: Sequence[Case], inputs: Sequence[Tensor]) -> dict[Case, list[float]]:
    """Milliseconds of single inputs, the cases in turn."""
    times: dict[Case, list[float]] = {case: [] for case in found}
    for round_ in range(ROUNDS + 1):
        for case in found:
            for x in inputs:
                start = time.perf_counter()
                case.run(x)
                if round_:  # the first one compiles and warms up
                    times[case].append(1e3 * (time.perf_counter() - start))
    return times


def peak_above(run: Callable[[], object]) -> int:
    """Bytes that the process grows by at most while `run` runs."""
    processes.reset_peak()
    before = processes.resident()
    run()
    return processes.peak() - before


def memory(plain: nn.Module, ours: Case, inputs: Sequence[Tensor]) -> tuple[float, float]:
    """(bytes that decoding needs beside the original weights, over the packed size; that size)."""
    packed = sum(site.bytes_after for site in fqcompile.reports()[-1].plan.quantized)
    grown = peak_above(lambda: [ours.run(x) for x in inputs])
    return (_packed_bytes(plain) + grown) / packed, packed / 2**20


def _packed_bytes(block: nn.Module) -> int:
    """What the store holds for the block's parameters, each memory once."""
    storages = [t.untyped_storage() for t in STORE.tensors_of(tuple(block.parameters()))]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench expert_decode", description=__doc__)
    parser.add_argument("--tokens", default="1,4", help="a comma-separated list (default: 1,4)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = {**SHAPE, "top_k": TOP_K, "threads": arguments.threads}
    results = Results(identity(torch.device("cpu")), settings, arguments.json)
    for dtype in DTYPES:
        layers = blocks(DTYPES[dtype])
        oracle = dequantized(layers[FORMS[0]], _inputs(dtype, 1)[0])
        for tokens in map(int, arguments.tokens.split(",")):
            inputs = _inputs(dtype, tokens)
            torch._dynamo.reset()
            found = cases(dtype, layers, output(oracle, inputs[0]), inputs[0])
            results.add(*_rows(found, layers[FORMS[0]], tokens, inputs))
    show(results, section.expert_decode)


def _inputs(dtype: str, tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shape = (1, tokens, SHAPE["hidden_size"])
    return [torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(INPUTS)]


def _rows(
    found: Sequence[Case], plain: nn.Module, tokens: int, inputs: Sequence[Tensor]
) -> list[Row]:
    times = timed(found, inputs)
    share, packed = memory(plain, next(case for case in found if case.ours), inputs)
    rows = []
    for case, milliseconds in times.items():
        low, _, _, high = quantiles(milliseconds, n=5)
        about: Row = {"tokens": tokens, "dtype": case.dtype, "form": case.form, "ours": case.ours}
        about |= {"ms": median(milliseconds), "low": low, "high": high, "best": min(milliseconds)}
        rows.append(about | {"memory": share, "packed_mib": packed})
    return rows


if __name__ == "__main__":
    main()

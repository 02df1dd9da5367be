"""Attention of one query on a CPU: our kernel, PyTorch's, and the time to read K and V once.

    python -m bench decode_attention [--shapes gemma-3-270m llama-3-8b ...]
        [--contexts 512,2048,8192] [--dtypes bfloat16,float32] [--threads 1,2]
        [--json FILE] [--time-budget SECONDS]

A graph of LAYERS layers is compiled by our backend and by Inductor: each layer attends to a full
static cache of its own, with the mask and the repeated heads that Hugging Face's models write.
Results are compared with fp64 before anything is timed. All ways run in turn, each call on other
caches, so that keys and values come from memory, as where weights are read between two layers.
Of 25 calls the median, 20th and 80th percentile, in microseconds of one layer. "read" sums up the
bytes of the same caches: the rate of one forward pass over memory.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench.core.measure import (
    MANY_COMPILATIONS,
    Replay,
    microseconds,
    recorded_on_cpu,
    relative_error,
    timed_if_right,
)
from bench.core.results import Results, Row, Step, duration
from bench.core.section import failures, show
from bench.decode_attention.section import decode_attention
from fqcompile.commands import counts as row_counts
from fqcompile.kernels.tuning.measure import WrongResult

# Heads of keys and values, heads of queries, width of a head.
SHAPES = {
    "gemma-3-270m": (1, 4, 256),
    "llama-3.2-1b": (8, 32, 64),
    "llama-3-8b": (8, 32, 128),
    "qwen3-30b-a3b": (4, 32, 128),
}
DTYPES = ("bfloat16", "float16", "float32")
LAYERS = 8
CACHES = 96 << 20  # bytes of all: three times what a cache of the processor holds
Layers = list[Tensor]  # [2, 1, heads of K, context, width] of each


def repeated(t: Tensor, times: int) -> Tensor:
    """As Hugging Face's repeat_kv."""
    batch, heads, keys, width = t.shape
    wide = t[:, :, None, :, :].expand(batch, heads, times, keys, width)
    return wide.reshape(batch, heads * times, keys, width)


def decode(q: Tensor, mask: Tensor, caches: Layers) -> list[Tensor]:
    """One query of each layer."""
    times = q.shape[1] // caches[0].shape[2]
    return [
        F.scaled_dot_product_attention(q, repeated(k, times), repeated(v, times), mask)
        for k, v in caches
    ]


def read(q: Tensor, mask: Tensor, caches: Layers) -> list[Tensor]:
    return [cache.view(torch.int64).sum() for cache in caches]


def steps(arguments: argparse.Namespace) -> Iterator[Step]:
    """Every context of every shape, in each type, with each number of threads."""
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for dtype in arguments.dtypes:
            for shape in tqdm(arguments.shapes, f"{dtype}, {threads} threads", disable=None):
                for context in arguments.contexts:
                    name = f"{shape} {context} {dtype}, {threads} threads"
                    yield name, partial(_rows, shape, context, dtype, threads)


def _rows(shape: str, context: int, dtype: str, threads: int) -> Iterator[Row]:
    torch._dynamo.reset()
    kv_heads, heads, width = SHAPES[shape]
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    q = torch.randn(1, heads, 1, width).to(kind)
    first = [torch.randn(2, 1, kv_heads, context, width).to(kind) for _ in range(LAYERS)]
    nbytes = first[0].nbytes
    sets = [first, *(_copies(first) for _ in range(CACHES // (LAYERS * nbytes)))]
    mask = torch.ones(1, 1, 1, context, dtype=torch.bool)
    compiled = {
        "fqcompile": torch.compile(decode, backend="finequant"),
        "inductor": torch.compile(decode, backend="inductor"),
    }
    expected = [out.double() for out in decode(q.double(), mask, [c.double() for c in first])]
    ways: dict[str, Callable[[], Replay]] = {
        name: partial(_recorded, way, q, mask, sets, expected) for name, way in compiled.items()
    }
    ways["read"] = lambda: recorded_on_cpu([partial(read, q, mask, caches) for caches in sets])
    times, why = timed_if_right(ways)
    about = {"shape": shape, "context": context, "dtype": dtype, "threads": threads}
    for name in ways:
        if name in why:
            yield {**about, "way": name, "failure": why[name]}
            continue
        found = {key: value / LAYERS for key, value in microseconds(times[name]).items()}
        yield {**about, "way": name, "bytes": nbytes, **found}


def _copies(layers: Layers) -> Layers:
    return [cache.clone() for cache in layers]


def _recorded(
    way: Callable[..., list[Tensor]],
    q: Tensor,
    mask: Tensor,
    sets: Sequence[Layers],
    expected: Sequence[Tensor],
) -> Replay:
    """Ready to be timed.

    Raises:
        WrongResult: it computes something else. Weights and results may be rounded to their dtype,
            and sums are fp32: those of T values are √T smaller than if they had one sign, so half
            an ulp of what is added up counts √T times.
    """
    error = max(map(relative_error, way(q, mask, sets[0]), expected))
    half_ulp = torch.finfo(torch.float32).eps / 2
    allowed = 2 * torch.finfo(q.dtype).eps + mask.shape[-1] ** 0.5 * half_ulp
    if not error <= allowed:
        raise WrongResult(f"relative error {error:.2g}, allowed {allowed:.2g}")
    return recorded_on_cpu([partial(way, q, mask, caches) for caches in sets])


def _dtypes(text: str) -> list[str]:
    """Comma-separated types that the kernel takes: of others PyTorch's would be timed as ours."""
    if set(parts := text.split(",")) <= set(DTYPES):
        return parts
    raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(DTYPES)}")


@torch.no_grad()
@torch._dynamo.config.patch(**MANY_COMPILATIONS)
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--contexts", type=row_counts, default=[512, 2048, 8192])
    parser.add_argument("--dtypes", type=_dtypes, default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=row_counts, default=[1, 2])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--time-budget", type=duration, default=1100.0, metavar="SECONDS")
    arguments = parser.parse_args(argv)
    before = torch.get_num_threads()
    results = Results.of(arguments, torch.device("cpu"))
    results.fill(steps(arguments), arguments.time_budget)
    torch.set_num_threads(before)
    results.write()
    print(failures(results.content, "way"))
    show(results, decode_attention)


if __name__ == "__main__":
    main()

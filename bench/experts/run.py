"""A layer of experts, routing included, against torch._grouped_mm on bf16 weights, on a GPU.

    python -m bench experts --device cuda [--models qwen3-30b-a3b mixtral-8x7b] [--bits 4]
        [--tokens 1,2,4,8,16,64,256,1024,4096] [--group 128|column] [--dtype bf16|fp16]
        [--tune fast|max] [--json FILE] [--time-budget SECONDS]

Timed are gathering or sorting, both matmuls with silu(gate) * up between them, and the weighted sum
over each token's experts (`bench.experts.layers`), by each of our three regimes and by PyTorch. The
router itself is not. Each result is held against fp64 first. Then all are timed in turn, from CUDA
graphs; each call reads experts that those before it did not, so that none come from the L2 cache;
25 replays: the median, 20th and 80th percentile. "of ideal" is the least time that memory or matrix
units allow for both matmuls as quantized over the time measured. Last come the numbers of tokens
from which another regime is the fastest.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from bench.core.measure import LEASE, Record, Replay, microseconds, recorded_on_gpu, timed_if_right
from bench.core.results import Results, Row, Step, duration
from bench.core.shapes import DTYPES, EXPERTS, GROUPED_MM, MATRICES
from bench.experts.layers import DENSE_WAY, GATHERED, GROUPED, ExpertLayer, Way
from fqcompile.commands import counts, group_size
from fqcompile.kernels.roofline import ideal_seconds
from fqcompile.kernels.spec import Gpu, gpu_of
from fqcompile.kernels.tuning.launches import Mode
from fqcompile.kernels.tuning.measure import WrongResult

TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
REGIMES = (GATHERED, GROUPED, DENSE_WAY)  # in the order in which more tokens make them the fastest


def measured_rows(layer: ExpertLayer, tokens: int, tune: Mode, record: Record) -> Iterator[Row]:
    """A row for each way: its timing, or why there is none."""
    expected = layer.expected(tokens)
    ways = list(layer.ways(tokens, tune))
    ready = {w.name: partial(_recorded, layer, w, tokens, expected, record) for w in ways}
    found, failures = timed_if_right(ready)
    specs = [layer.spec(matrix, "grouped", tokens) for matrix in MATRICES]
    ideal, baseline = 1e6 * sum(ideal_seconds(s, s.m) for s in specs), found.get(GROUPED_MM)
    for way in ways:
        row: Row = {"tokens": tokens, "contender": way.name, "detail": way.detail}
        row["ideal_us"] = ideal
        if way.name in failures:
            yield row | {"failure": failures[way.name]}
            continue
        timing = found[way.name]
        over = baseline and baseline.microseconds / timing.microseconds
        shares = {"of_ideal": ideal / timing.microseconds, "over_grouped_mm": over}
        yield row | microseconds(timing) | shares


def _recorded(
    layer: ExpertLayer, way: Way, tokens: int, expected: Tensor, record: Record
) -> Replay:
    calls = layer.calls(way, tokens)
    wrong = layer.wrong_result(calls[0](), expected)
    if wrong is not None:
        raise WrongResult(wrong)
    return record(calls)


def steps(
    arguments: argparse.Namespace, device: torch.device, gpu: Gpu, record: Record
) -> Iterator[Step]:
    """Every number of tokens of every model, whose layer is made by the first there is time for."""
    a = arguments
    for model in tqdm(a.models, "models", disable=None):
        shape = EXPERTS[model]
        size = max(shape[2:]) if a.group == "column" else a.group
        form = (a.bits, size, DTYPES[a.dtype], device, gpu)
        layer = cache(partial(ExpertLayer, shape, max(a.tokens), *form))
        for tokens in a.tokens:
            yield f"{model} {tokens} tokens", partial(_rows, model, layer, tokens, a.tune, record)


def _rows(
    model: str, layer: Callable[[], ExpertLayer], tokens: int, tune: Mode, record: Record
) -> list[Row]:
    return [{"model": model, **row} for row in measured_rows(layer(), tokens, tune, record)]


@torch.no_grad()
def run(arguments: argparse.Namespace, device: torch.device, gpu: Gpu, record: Record) -> Results:
    """Everything that the arguments ask for, or what the time budget allows of it."""
    results = Results.of(arguments, device)
    results.fill(steps(arguments, device, gpu, record), arguments.time_budget)
    return results


def by_tokens(rows: Sequence[Row]) -> dict[tuple[str, int], dict[str, Row]]:
    """{(model, tokens): {way: row}} in the order met."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["tokens"]), {})[row["contender"]] = row
    return found


def crossovers(rows: Sequence[Row]) -> list[str]:
    """For each model, which regime is the fastest from how many tokens on."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        steps: list[str] = []
        last = ""
        for (name, tokens), ways in by_tokens(rows).items():
            times = {
                regime: ways[regime]["us"] for regime in REGIMES if "us" in ways.get(regime, {})
            }
            best = min(times, key=times.__getitem__, default="")
            if name == model and best and best != last:
                steps.append(f"{best.removeprefix('fqcompile ')} from {tokens}")
                last = best
        lines.append(f"{model}: {', '.join(steps) or 'nothing was timed'} tokens")
    return lines


def table(rows: Sequence[Row]) -> str:
    """Microseconds; "of ideal" and the ratio to PyTorch are of the fastest of ours."""
    names = [*REGIMES, GROUPED_MM]
    lines = []
    for (model, tokens), ways in by_tokens(rows).items():
        timed = [row for row in ways.values() if "us" in row]
        ours = [row for row in timed if row["contender"] in REGIMES]
        best = min(ours, key=lambda row: row["us"], default=None)
        over = best and best["over_grouped_mm"]
        widest = max(((row["high"] - row["low"]) / row["us"] for row in timed), default=None)
        lines.append(
            [
                model,
                tokens,
                f"{next(iter(ways.values()))['ideal_us']:.1f}",
                *(f"{ways[n]['us']:.1f}" if "us" in ways.get(n, {}) else "" for n in names),
                "" if best is None else f"{best['of_ideal']:.0%}",
                "" if over is None else f"{over:.2f}x",
                "" if widest is None else f"{widest:.1%}",
            ]
        )
    headers = ["model", "tokens", "ideal", *names, "of ideal", f"over {GROUPED_MM}", "spread"]
    return tabulate(lines, [text.replace(" ", "\n") for text in headers], disable_numparse=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda",), default="cuda")
    parser.add_argument("--models", nargs="+", choices=EXPERTS, default=list(EXPERTS))
    parser.add_argument("--tokens", type=counts, metavar="T,...", default=list(TOKENS))
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--group", type=group_size, default=128, help='size along K, or "column"')
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--tune", choices=("off", "fast", "max"), default="off")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and identity there")
    parser.add_argument("--time-budget", type=duration, default=LEASE, metavar="SECONDS")
    return parser.parse_args(argv)


def show(results: Results) -> None:
    """What went wrong, what is missing, what it was measured on; the table and its crossovers."""
    for row in results.rows:
        if "failure" in row:
            print(f"{row['model']} {row['tokens']} tokens, {row['contender']}: {row['failure']}")
    print(", ".join(f"{key} {value}" for key, value in results.identity.items()))
    if results.left_out:
        print(f"left out {len(results.left_out)}: {', '.join(results.left_out)}")
    s = results.settings
    print(f"\nint{s['bits']}, group {s['group']}, {s['dtype']}; microseconds, medians:\n")
    print(table(results.rows))
    print("\nfastest of ours:\n" + "\n".join(crossovers(results.rows)))


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    device = torch.device(arguments.device)
    show(run(arguments, device, gpu_of(device), recorded_on_gpu))


if __name__ == "__main__":
    main()

"""The 16 levels of the format `normal4`: how they were found, and what other levels would lose.

    python -m bench levels [--model]

Lloyd's algorithm on normal weights in groups of 32 to 256, under the quantizer's own scale search:
each level becomes the mean of the weights that are nearest to it, in units of their group's scale.
From there neighboring levels are moved by a sixteenth, and scales are searched anew, while that
lowers the squared error. Levels are sixteenths, exact in 16 bits, and one table serves all sizes.

    free        any levels
    with zero   one is exactly zero: pruned weights, and what fills up rows, keep their value
    mirrored    and all levels are c - a, c + a for 8 magnitudes a: a GPU looks up one of 8, puts in
                the sign and adds c in the fma that scales
    symmetric   c = 0, without a zero

`--model` compares the tables on the weights of MiniLM, by the mean over draws.
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise, product

import torch
from torch import Tensor

from bench.accuracy.draws import DRAWS, draw_rows
from bench.accuracy.subjects import minilm_subject
from bench.accuracy.ways import BASE, Way, their_way
from fqcompile.quant.affine import quantize_affine
from fqcompile.quant.granularity import bits_per_weight
from fqcompile.quant.scale_search import search_scale, signed_extremes
from fqcompile.tensor.chunks import grouped
from fqcompile.tensor.codes import dequantize_rows, pack
from fqcompile.tensor.format import INT4, NORMAL4, QType

GROUPS = (32, 64, 128, 256)
WEIGHTS = 1 << 17  # in groups of each size
LARGEST = 127  # sixteenths
_ROUNDS = 12
_SIZE = 64  # of groups, where models are compared
_GAIN = 1e-4  # less of the squared error is chance

Sixteenths = tuple[int, ...]
Numbers = Sequence[int]


# The tables of a kind, each by what may be chosen of it; the lowest level is always -127.
def _free(numbers: Numbers) -> Sixteenths:
    return (-LARGEST, *numbers)


def _with_zero(numbers: Numbers) -> Sixteenths:
    return (-LARGEST, *numbers[:7], 0, *numbers[7:])


def mirrored(numbers: Numbers) -> Sixteenths:
    """Of c, and of the magnitudes between -c, which gives the zero, and the largest."""
    c, *inner = numbers
    magnitudes = (-c, *inner, LARGEST + c)
    return (*(c - a for a in reversed(magnitudes)), *(c + a for a in magnitudes))


def _symmetric(numbers: Numbers) -> Sixteenths:
    magnitudes = (*numbers, LARGEST)
    return (*(-a for a in reversed(magnitudes)), *magnitudes)


# With the numbers that are nearest to given free ones.
KINDS: dict[str, tuple[Callable[[Numbers], Sixteenths], Callable[[Sixteenths], list[int]]]] = {
    "free": (_free, lambda n: [*n[1:]]),
    "with zero": (_with_zero, lambda n: [*n[1:8], *n[9:]]),
    "mirrored": (mirrored, lambda n: mirrored_numbers(n)),
    "symmetric": (_symmetric, lambda n: [(n[8 + i] - n[7 - i]) // 2 for i in range(7)]),
}


def mirrored_numbers(sixteenths: Sixteenths) -> list[int]:
    """c and the inner magnitudes of a table, or of the mirrored one that is near to it."""
    middles = [(sixteenths[8 + i] + sixteenths[7 - i]) // 2 for i in range(8)]
    halves = [(sixteenths[8 + i] - sixteenths[7 - i]) // 2 for i in range(1, 7)]
    return [min(sum(middles) // 8, -1), *halves]


def table(sixteenths: Sixteenths) -> QType:
    """A format with these levels."""
    return QType(
        bits=4,
        levels="trial",
        storage_dtype=torch.uint8,
        least_step=NORMAL4.least_step,
        sixteenths=sixteenths,
    )


def normal_weights(count: int = WEIGHTS, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def derive(kind: str, w: Tensor) -> Sixteenths:
    """The best levels of a kind for these weights."""
    # Not symmetric, so that both signs of a scale are of use.
    middles = torch.special.ndtri((torch.arange(16) + 0.5) / 16) - torch.linspace(0.1, 0, 16)
    found = _sixteenths(middles)
    for _ in range(_ROUNDS):
        found = _sixteenths(_means(table(found), w))
    make, numbers_of = KINDS[kind]
    return make(descend(make, numbers_of(found), w))


def _sixteenths(levels: Tensor) -> Sixteenths:
    return tuple((levels * (-LARGEST / levels[0])).round().int().tolist())


def _means(qtype: QType, w: Tensor) -> Tensor:
    """Of the weights that are nearest to each level; they count by the square of their scale."""
    sums, counts = torch.zeros(16), torch.zeros(16)
    for size in GROUPS:
        groups = w.view(-1, size)
        scale = _scales(groups, qtype, size)
        index = quantize_affine(groups, scale, qtype, size).flatten().int() - qtype.qmin
        squares = scale.square().expand(groups.shape).flatten()
        sums.index_add_(0, index, squares * (groups / scale).flatten())
        counts.index_add_(0, index, squares)
    return sums / counts


def descend(make: Callable[[Numbers], Sixteenths], numbers: Sequence[int], w: Tensor) -> list[int]:
    """Numbers of which no run can change by 1 and lower the error of the table they make."""
    found, least, moved = list(numbers), error_of(make(numbers), w), True
    while moved:
        moved = False
        for (first, last), step in product(combinations(range(len(found) + 1), 2), (1, -1)):
            trial = [n + step * (first <= i < last) for i, n in enumerate(found)]
            error = error_of(make(trial), w)
            if error < least * (1 - _GAIN):
                found, least, moved = trial, error, True
    return found


def error_of(sixteenths: Sixteenths, w: Tensor) -> float:
    """Mean squared error over all group sizes; infinite if these are no levels."""
    ascend = all(a < b for a, b in pairwise(sixteenths))
    if not ascend or max(sixteenths) > LARGEST:
        return float("inf")
    qtype = table(sixteenths)
    return sum(squared_error(qtype, size, w) for size in GROUPS) / len(GROUPS)


def squared_error(qtype: QType, group_size: int, w: Tensor) -> float:
    """Per weight, with scales in float16."""
    groups = w.view(-1, group_size)
    return (_dequantized(qtype, group_size, groups) - groups).square().mean().item()


def _scales(w: Tensor, qtype: QType, group_size: int) -> Tensor:
    """As `choose_scale` finds them by PyTorch's operations: the C++ knows the levels of formats."""
    groups = grouped(w, group_size)
    return search_scale(groups, signed_extremes(groups), qtype)


def _dequantized(qtype: QType, group_size: int, w: Tensor) -> Tensor:
    scale = _scales(w, qtype, group_size).half()
    codes = pack(quantize_affine(w, scale, qtype, group_size), qtype)
    return dequantize_rows(codes, scale, qtype, group_size, w.shape[1], torch.float32)


def _way(qtype: QType) -> Way:
    def quantize(w: Tensor) -> tuple[Tensor, float]:
        return _dequantized(qtype, _SIZE, w), bits_per_weight(4, *w.shape, _SIZE, 16)

    return their_way(quantize)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", action="store_true", help="compare them on MiniLM too")
    arguments = parser.parse_args(argv)
    w, others = normal_weights(), normal_weights(seed=1)
    tables = {kind: table(derive(kind, w)) for kind in KINDS}
    formats = {"uniform": INT4, "normal4": NORMAL4, **tables}
    print(f"squared error of other weights in thousandths, groups of {GROUPS}")
    for name, qtype in formats.items():
        errors = (f"{1000 * squared_error(qtype, size, others):.3f}" for size in GROUPS)
        print(f"{name:10}", *errors, qtype.sixteenths or "")
    if arguments.model:
        ways = {BASE if n == "uniform" else n: _way(qtype) for n, qtype in formats.items()}
        for row in draw_rows(minilm_subject(), ways, DRAWS):
            print(
                "MiniLM 1 - cosine {way:18} {divergence:.5f} sd {spread:.5f} {ratio:.3f}".format(
                    **row
                )
            )


if __name__ == "__main__":
    main()

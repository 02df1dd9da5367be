"""What the accuracy rows are held against: each target, its two numbers, and whether it is met.

A target that compares at equal or fewer bits is only asked of rivals that take at least as many.
The adaptive rule decides its bits by itself; a rival that takes more of them than it is also held
against the one of our ways that comes nearest to the rival's bits from below.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from bench.core.results import Row

ADAPTIVE, RANGE, COLUMN = (f"int4 {rule} mse" for rule in ("adaptive", "range", "column"))
FIXED = (COLUMN, *(f"int4 g{size} mse" for size in (128, 64, 32)))
NAIVE_COLUMN = "int4 column absmax"
INT8 = "int8 adaptive mse"
NF4_FACTOR, INT8_SHARE, OUTLIER_SHARE, COLLAPSE = 1.05, 0.001, 0.2, 5.0
MEASURES = ("loss", "divergence")
_RIVALS = ("hqq", "torchao", "nf4", "int4 g128 mse")
# Their bits differ by the scales of a few rows at most; what is equal on paper is equal here.
_SAME_BITS = 1e-6


@dataclass(frozen=True)
class Verdict:
    """`value` should be below `limit`; `met` is None where the comparison cannot be made."""

    target: str
    model: str
    value: float
    limit: float
    met: bool | None
    note: str = ""


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """All targets for all models among the rows."""
    found: list[Verdict] = []
    for model in dict.fromkeys(row["model"] for row in rows if row["part"] == "quality"):
        quality, outliers = (
            {r["way"]: r for r in rows if r["part"] == part and r["model"] == model and "loss" in r}
            for part in ("quality", "outliers")
        )
        found += [*_against_others(model, quality), *_int8(model, quality)]
        found += _outliers(model, quality, outliers)
    return found


def _against_others(model: str, rows: dict[str, Row]) -> Iterator[Verdict]:
    """By the loss, which chance moves, and by the divergence, which it moves little."""
    if ADAPTIVE not in rows:
        return
    rivals = {w: r for w, r in rows.items() if w.startswith(_RIVALS)}
    for measure, (way, row) in product(MEASURES, rivals.items()):
        yield _against(model, measure, way, row, rows[ADAPTIVE])
        nearest = _nearest_below(row["bits_per_weight"], rows)
        if nearest is not None and nearest["way"] not in (ADAPTIVE, way):
            yield _against(model, measure, way, row, nearest)
    for measure in MEASURES:
        yield from _against_fixed_groups(model, measure, rows)


def _against(model: str, measure: str, way: str, row: Row, own: Row) -> Verdict:
    """A row of ours against a rival's."""
    factor = NF4_FACTOR if way.startswith("nf4") else 1.0
    ours, theirs = own["bits_per_weight"], row["bits_per_weight"]
    limit = factor * row[measure]
    met = own[measure] < limit if ours <= theirs + _SAME_BITS else None
    whose = own["way"].removeprefix("int4 ").removesuffix(" mse")
    name = f"{whose}'s {measure} below {way}'s" + (f" x {factor}" if factor != 1 else "")
    note = f"{ours:.2f} against {theirs:.2f} bits"
    beyond = f"{measure}_beyond"
    if own["way"] == ADAPTIVE and row.get(f"{beyond}_low", 0) <= 0 <= row.get(f"{beyond}_high", 0):
        note += "; the difference is within the noise"
    return Verdict(name, model, own[measure], limit, met, note)


def _against_fixed_groups(model: str, measure: str, rows: dict[str, Row]) -> Iterator[Verdict]:
    """One size for all, or two so that adaptive's bits come out."""
    fixed = sorted((rows[w]["bits_per_weight"], rows[w][measure]) for w in FIXED if w in rows)
    bits, value = (rows[ADAPTIVE][name] for name in ("bits_per_weight", measure))
    limit = mixed(fixed, bits)
    if limit is not None:
        name = f"adaptive's {measure} below that of fixed groups mixed to its bits"
        yield Verdict(name, model, value, limit, value < limit, f"{bits:.2f} bits")


def mixed(points: Sequence[tuple[float, float]], bits: float) -> float | None:
    """Between the two of the sorted points (bits, value) around these bits; None outside."""
    for (fewer, before), (more, after) in pairwise(points):
        if fewer <= bits <= more:
            return before + (after - before) * (bits - fewer) / (more - fewer)
    return None


def _nearest_below(bits: float, rows: dict[str, Row]) -> Row | None:
    """Our 4-bit way of most bits among those that take no more than this; adaptive of a tie."""
    fitting = [
        row
        for way, row in rows.items()
        if way.startswith("int4") and way.endswith("mse")
        if row["bits_per_weight"] <= bits + _SAME_BITS
    ]
    return max(fitting, key=lambda r: (r["bits_per_weight"], r["way"] == ADAPTIVE), default=None)


def _int8(model: str, rows: dict[str, Row]) -> Iterator[Verdict]:
    if INT8 in rows:
        row = rows[INT8]
        limit = INT8_SHARE * (row["bits_per_byte"] - row["loss"])
        yield Verdict("int8 within 0.1 % of fp32", model, row["loss"], limit, row["loss"] <= limit)


def _outliers(model: str, plain: dict[str, Row], rows: dict[str, Row]) -> Iterator[Verdict]:
    for measure in MEASURES:
        for way in (NAIVE_COLUMN, COLUMN):
            if way in rows and way in plain:
                after, before = rows[way][measure], COLLAPSE * plain[way][measure]
                name = f"outliers multiply {way}'s {measure} by {COLLAPSE:g}"
                yield Verdict(name, model, before, after, before < after)
        for way in (ADAPTIVE, RANGE):
            if way in rows and COLUMN in rows:
                value, limit = rows[way][measure], OUTLIER_SHARE * rows[COLUMN][measure]
                name = f"with outliers {way}'s {measure} below a fifth of column's"
                yield Verdict(name, model, value, limit, value < limit)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points (bits, loss) that no other point beats in one and equals in the other.

    Ordered by bits; of equal points the first.
    """
    front: list[int] = []
    for number in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[number][1] < points[front[-1]][1]:
            front.append(number)
    return front

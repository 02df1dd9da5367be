"""The accuracy rows as text, table by table."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate

from bench.accuracy.targets import Verdict
from bench.core.results import Row

_MILLI = 1000  # losses are shown in thousandths of a bit per byte


def _of(rows: Iterable[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part and "failure" not in row]


def fp32_table(rows: Sequence[Row]) -> str:
    """The models themselves."""
    headers = ("model", "parameters", "trained on tokens", "bits/byte", "bytes' own entropy", "of")
    cells = [
        (
            r["model"],
            r["training"]["parameters"],
            r["training"]["training_tokens"],
            r["bits_per_byte"],
            r["training"]["bytes_alone"],
            f"{r['documents']} files, {r['bytes']} bytes",
        )
        for r in _of(rows, "fp32")
    ]
    return tabulate(cells, headers, floatfmt=".3f")


def quality_table(rows: Sequence[Row], part: str) -> str:
    """One line per model and way, by bits and then by loss."""
    headers = (
        "model",
        "way",
        "bits/weight",
        "error",
        "loss",
        "95 %",
        "divergence",
        "beyond adaptive",
        "agree",
    )
    found = _of(rows, part)
    order = {model: place for place, model in enumerate(dict.fromkeys(r["model"] for r in found))}
    found.sort(key=lambda r: (order[r["model"]], -r["bits_per_weight"], r["loss"]))
    cells = [
        (
            r["model"],
            r["way"],
            f"{r['bits_per_weight']:.3f}",
            f"{r['mean_error']:.4f}",
            f"{_MILLI * r['loss']:.2f}",
            _interval(r, "loss"),
            f"{_MILLI * r['divergence']:.3f}",
            _beyond(r),
            f"{r['agreement']:.1%}",
        )
        for r in found
    ]
    aligned = ("left", "left", *["right"] * (len(headers) - 2))
    return tabulate(cells, headers, disable_numparse=True, colalign=aligned if cells else None)


def _interval(row: Row, what: str) -> str:
    return f"[{_MILLI * row[f'{what}_low']:.2f}, {_MILLI * row[f'{what}_high']:.2f}]"


def _beyond(row: Row) -> str:
    """How much more it diverges than the adaptive rule; "noise" where the interval holds zero."""
    if "divergence_beyond" not in row:
        return ""
    low, high = row["divergence_beyond_low"], row["divergence_beyond_high"]
    text = f"{_MILLI * row['divergence_beyond']:+.3f}"
    return f"{text} (noise)" if low <= 0 <= high else text


def error_table(rows: Sequence[Row]) -> str:
    """Relative error of each layer type, by way."""
    tables = []
    quality = [r for r in _of(rows, "quality") if "bits" in r]
    for model in dict.fromkeys(r["model"] for r in quality):
        own = [r for r in quality if r["model"] == model]
        types = list(own[0]["errors"])
        cells = [(r["way"], *(r["errors"].get(t) for t in types)) for r in own]
        tables.append(tabulate(cells, (f"{model}: weight error", *types), floatfmt=".4f"))
    return "\n\n".join(tables)


def sensitivity_table(rows: Sequence[Row]) -> str:
    """The loss where one layer type alone is quantized."""
    headers = ("model", "layer type alone", "way", "loss", "95 %", "divergence", "95 %")
    cells = [
        (
            *(r[name] for name in ("model", "layer_type", "way")),
            f"{_MILLI * r['loss']:.2f}",
            _interval(r, "loss"),
            f"{_MILLI * r['divergence']:.3f}",
            _interval(r, "divergence"),
        )
        for r in _of(rows, "sensitivity")
    ]
    return tabulate(cells, headers, disable_numparse=True)


def allocation_table(rows: Sequence[Row]) -> str:
    """What group sizes matrix by matrix bring beside fixed ones, predicted from each alone."""
    headers = ("model", "sizes by", "bits/weight", "predicted", "fixed groups", "less by")
    cells = [
        (
            r["model"],
            r["way"].removeprefix("int4 ").removesuffix(" mse"),
            f"{r['bits_per_weight']:.3f}",
            *(f"{_MILLI * r[name]:.3f}" for name in ("predicted", "fixed_groups")),
            f"{1 - r['predicted'] / r['fixed_groups']:.1%}",
        )
        for r in _of(rows, "allocation")
    ]
    return tabulate(cells, headers, disable_numparse=True)


def embedding_table(rows: Sequence[Row]) -> str:
    """The sentence embeddings, by bits."""
    headers = ("MiniLM", "bits/weight", "error", "cosine", "least", "same neighbor")
    names = ("way", "bits_per_weight", "mean_error", "cosine", "least_cosine", "same_neighbor")
    found = sorted(_of(rows, "embeddings"), key=lambda r: (-r["bits_per_weight"], r["mean_error"]))
    return tabulate([[r[n] for n in names] for r in found], headers, floatfmt=".4f")


def verdict_table(found: Sequence[Verdict]) -> str:
    """Each target: met, MISSED, or not comparable."""
    words = {True: "met", False: "MISSED", None: "takes more bits"}
    cells = [
        (
            v.target,
            v.model,
            f"{_MILLI * v.value:.2f}",
            f"{_MILLI * v.limit:.2f}",
            words[v.met],
            v.note,
        )
        for v in found
    ]
    headers = ("target", "model", "value", "below", "", "")
    return tabulate(cells, headers, disable_numparse=True)

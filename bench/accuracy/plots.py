"""Figures of the accuracy rows, as SVG; none where matplotlib is not installed.

divergence against bits per weight, the Pareto front     accuracy-pareto.svg
how wide columns are, before and after outliers          accuracy-ranges.svg
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.accuracy.quantized import QUANTILES
from bench.accuracy.targets import pareto_front
from bench.core.results import Row

_COLORS = {"int4": "#1f6feb", "hqq": "#d1242f", "nf4": "#8250df", "torchao": "#bf8700"}


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The figures that the rows allow; what was written."""
    if find_spec("matplotlib") is None:
        print("no figures: matplotlib is not installed; it is in the extra named bench")
        return []
    matplotlib = import_module("matplotlib")
    matplotlib.use("Agg")
    # Fixed names inside the file: the same rows give the same bytes.
    matplotlib.rcParams.update({"svg.hashsalt": "fqcompile", "font.size": 8})
    figures = {"pareto": _pareto, "ranges": _ranges}
    written = [_write(name, figure, rows, folder) for name, figure in figures.items()]
    return [path for path in written if path is not None]


def _write(
    name: str, figure: Callable[[Any, Sequence[Row]], Any], rows: Sequence[Row], folder: Path
) -> Path | None:
    pyplot = import_module("matplotlib.pyplot")
    drawn = figure(pyplot, rows)
    if drawn is None:
        return None
    path = folder / f"accuracy-{name}.svg"
    folder.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(drawn)
    return path


def _parts(rows: Sequence[Row], part: str) -> dict[str, list[Row]]:
    """The rows of this part by model."""
    found = [r for r in rows if r["part"] == part and "failure" not in r]
    models = dict.fromkeys(r["model"] for r in found)
    return {model: [r for r in found if r["model"] == model] for model in models}


def _panels(pyplot: Any, count: int, height: float = 3.2) -> tuple[Any, list[Any]]:
    figure, axes = pyplot.subplots(1, count, figsize=(4.2 * count, height), squeeze=False)
    return figure, list(axes[0])


def _pareto(pyplot: Any, rows: Sequence[Row]) -> Any:
    """Points of 4-bit ways by bits and divergence, bootstrap whiskers, the front as a line."""
    models = _parts(rows, "quality")
    if not models:
        return None
    figure, axes = _panels(pyplot, len(models))
    for axis, (model, own) in zip(axes, models.items(), strict=True):
        shown = [r for r in own if r["bits_per_weight"] < 6]
        points = [(r["bits_per_weight"], r["divergence"]) for r in shown]
        for row, (bits, value) in zip(shown, points, strict=True):
            _point(axis, row, bits, value)
        front = [points[i] for i in pareto_front(points)]
        axis.step(*zip(*front, strict=True), where="post", color="gray", lw=0.8, zorder=0)
        axis.set(yscale="log", title=model, xlabel="bits per weight, scales counted")
    axes[0].set_ylabel("divergence from fp32, bits per byte")
    return figure


def _point(axis: Any, row: Row, bits: float, value: float) -> None:
    way = row["way"]
    absmax = way.endswith("absmax")
    color = _COLORS[way.split()[0]]
    low, high = (row[f"divergence_{end}"] for end in ("low", "high"))
    axis.plot([bits, bits], [low, high], color=color, lw=0.6, alpha=0.4)
    filled = "white" if absmax else color
    axis.plot(bits, value, "o", ms=4, color=color, mfc=filled)
    label = way.removeprefix("int4 ").removesuffix(" mse")
    axis.annotate(label, (bits, value), fontsize=5, xytext=(3, 2), textcoords="offset points")


def _ranges(pyplot: Any, rows: Sequence[Row]) -> Any:
    """Quantiles of max over root mean square of the columns of each layer type."""
    before, after = (_parts(rows, part) for part in ("ranges", "outlier ranges"))
    if not before:
        return None
    figure, axes = _panels(pyplot, len(before))
    for axis, model in zip(axes, before, strict=True):
        for parts, shift, color, label in (
            (before, -0.15, "#1f6feb", "trained"),
            (after, 0.15, "#d1242f", "with outliers"),
        ):
            for place, row in enumerate(parts.get(model, ())):
                _whisker(axis, place + shift, row["quantiles"], color, label if not place else "")
        axis.set_xticks(range(len(before[model])), [r["layer_type"] for r in before[model]])
        axis.tick_params("x", rotation=45)
        axis.set(yscale="log", title=model)
    axes[0].set_ylabel("largest weight of a column / its root mean square")
    axes[0].legend()
    return figure


def _whisker(axis: Any, place: float, quantiles: Sequence[float], color: str, label: str) -> None:
    ends = [quantiles[QUANTILES.index(q)] for q in (0.05, 0.95)]
    box = [quantiles[QUANTILES.index(q)] for q in (0.25, 0.75)]
    axis.plot([place] * 2, ends, color=color, lw=0.8)
    axis.plot([place] * 2, box, color=color, lw=4, alpha=0.6)
    axis.plot(place, quantiles[QUANTILES.index(0.5)], "_", color=color, label=label or None)

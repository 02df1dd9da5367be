"""What quantization costs in quality, on trained language models and on sentence embeddings.

    python -m bench accuracy [--family opt llama mixtral] [--quick] [--json FILE]

The models of train_lm.py, trained on first use; bits per byte of held-out files beside fp32's, and
how often the likeliest token is the same. Ours in every granularity and scale method, and other
libraries where they are installed, on the same matrices: embeddings, head and routers stay fp32
for all. Then each layer type quantized alone, the same models with outliers put into their
weights, and the MiniLM embeddings. Rows, figures and their identity go to a folder; the targets
and the tables come last.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from bench.accuracy import section
from bench.accuracy.corpus import stdlib_corpus
from bench.accuracy.language_model import Trained, Windows, windows_of
from bench.accuracy.others import BASELINES
from bench.accuracy.outliers import with_outliers
from bench.accuracy.plots import draw
from bench.accuracy.quantized import ours, range_rows
from bench.accuracy.rows import (
    SENSITIVE_WAYS,
    WAYS,
    Evaluated,
    Exact,
    baseline_row,
    embedding_rows,
    our_row,
    paired,
    row_of_type,
)
from bench.accuracy.targets import ADAPTIVE
from bench.accuracy.train_lm import FAMILIES, SIZES, trained
from bench.core.results import (
    RESULTS,
    Results,
    Row,
    device_name,
    identity,
    missing,
    slug,
    with_version,
)
from bench.core.section import show
from fqcompile.demo.embedding import load_embedder

_QUICK_WAYS = [w for w in WAYS if w.endswith("mse") or w == "int4 column absmax"]
_OUTLIER_WAYS = [w for w in WAYS if w.startswith("int4")]
_QUICK = {"size": "quick", "documents": 16}
# Sensitivities and outliers differ by factors, which fewer windows show as well.
_BRIEF = 4
CPU = torch.device("cpu")


def quality_rows(exact: Exact, ways: Sequence[str], baselines: bool = True) -> Iterator[Row]:
    """All ways on one model, each with how much more it loses than the adaptive rule."""
    with tqdm(total=len(ways) + len(BASELINES) * baselines, leave=False, disable=None) as progress:
        rows: list[Evaluated] = []
        for way in ways:
            rows.append(our_row(exact, way))
            progress.update()
        for baseline in BASELINES if baselines else ():
            if missing(baseline.package) is None:
                rows.append(baseline_row(exact, baseline))
            progress.update()
    reference = next((one for one in rows if one.row["way"] == ADAPTIVE), None)
    for one in rows:
        yield one.row if reference is None else one.row | paired(reference, one)


def sensitivity_rows(exact: Exact) -> Iterator[Row]:
    """The loss when the matrices of one layer type alone are quantized."""
    for way in SENSITIVE_WAYS:
        types = list(dict.fromkeys(w.layer_type for w in ours(exact.model, WAYS[way]).weights))
        yield from (row_of_type(exact, way, layer_type) for layer_type in types)


def windows(model: Trained, arguments: argparse.Namespace, most: int) -> Windows:
    documents = stdlib_corpus().held_out[:most]
    context = SIZES[arguments.size].context
    return windows_of(documents, model.tokenizer, context, arguments.windows)


def measure_family(family: str, arguments: argparse.Namespace, results: Results) -> None:
    """All parts on one model; rows are kept as they come."""
    model = trained(family, arguments.size)
    exact = Exact.of(model.model, windows(model, arguments, arguments.documents))
    brief = Exact.of(model.model, windows(model, arguments, -(-arguments.documents // _BRIEF)))
    lengths = exact.windows.bytes
    about = {"part": "fp32", "model": family, "bits_per_byte": exact.evaluation.bits_per_byte}
    sizes = {"documents": len(lengths), "bytes": int(lengths.sum())}
    results.add({**about, **sizes, "training": model.about})
    ways = _QUICK_WAYS if arguments.quick else list(WAYS)
    _add(results, family, "quality", quality_rows(exact, ways))
    _add(results, family, "ranges", range_rows(exact.model))
    if not arguments.quick:
        _add(results, family, "sensitivity", sensitivity_rows(brief))
    changed = _with_outliers(brief)
    outlier_ways = [w for w in _OUTLIER_WAYS if w in ways]
    _add(results, family, "outliers", quality_rows(changed, outlier_ways, not arguments.quick))
    _add(results, family, "outlier ranges", range_rows(changed.model))


def _with_outliers(exact: Exact) -> Exact:
    """The same function, evaluated again: what rounding alone does is in it."""
    model: nn.Module = with_outliers(exact.model)
    return Exact.of(model, exact.windows)


def _add(results: Results, family: str, part: str, rows: Iterator[Row]) -> None:
    for row in rows:
        results.add({"part": part, "model": family, **row})


def run(arguments: argparse.Namespace) -> Results:
    """Everything that the arguments ask for; the libraries that are missing are left out."""
    path = arguments.folder / "accuracy.json" if arguments.folder else None
    settings = {k: str(v) for k, v in vars(arguments).items() if k != "folder"}
    settings["baselines"] = ", ".join(
        with_version(b.package) for b in BASELINES if missing(b.package) is None
    )
    results = Results(identity(CPU), settings, path)
    results.leave_out(
        *(f"{b.name}: {why}" for b in BASELINES if (why := missing(b.package)) is not None)
    )
    for family in arguments.family:
        start = time.monotonic()
        measure_family(family, arguments, results)
        print(f"{family}: {time.monotonic() - start:.0f} s", flush=True)
    if not arguments.quick:
        present = [b for b in BASELINES if missing(b.package) is None]
        rows = embedding_rows(*load_embedder(), list(WAYS), present)
        _add(results, "MiniLM", "embeddings", iter(rows))
    return results


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--documents", type=int, default=80, help="held-out files at most")
    parser.add_argument("--windows", type=int, default=2, help="of each file, from its start")
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer rows")
    default = RESULTS / slug(device_name(CPU))
    parser.add_argument("--folder", type=Path, default=default, help="for rows and figures")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        vars(arguments).update(_QUICK)
        if arguments.folder == default:
            arguments.folder = None  # the full run's results stay
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    results = run(arguments)
    if arguments.folder:
        for path in draw(results.rows, arguments.folder):
            print(f"wrote {path}")
    show(results, section.accuracy)


if __name__ == "__main__":
    main()

"""fqcompile estimate: estimate memory, throughput and cost on GPUs that you do not have."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from tqdm import tqdm

from fqcompile.commands import count, counts, group_size
from fqcompile.errors import EstimateError, nearest
from fqcompile.estimator.assumptions import assumptions, formulas_text, general_text
from fqcompile.estimator.costs import Speed
from fqcompile.estimator.devices import DEVICES, Cluster, device_called
from fqcompile.estimator.estimate import (
    Estimate,
    Question,
    count_of,
    estimates,
    estimates_as_dict,
    estimates_text,
    seconds_of_a_token,
)
from fqcompile.estimator.matmuls import Sharing, Workload, formats
from fqcompile.estimator.model_shapes import named_models, read_decoder
from fqcompile.files.trusted import replace_text
from fqcompile.report.page import (
    Axis,
    Cell,
    Point,
    Section,
    Table,
    axis_over,
    paragraph,
    points_svg,
    render_page,
    table_html,
    unordered,
)

_FORMATS = ("bf16", "int8", "int4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models, GPUs, degrees of parallelism, workloads, and output files."""
    parser.add_argument(
        "--model", nargs="+", required=True, metavar="MODEL", help="a config.json, a directory "
        f"with one, or {', '.join(named_models())}",
    )  # fmt: skip
    _add_devices(parser)
    _add_lists(
        parser,
        ("--tp", [1], "degrees of tensor parallelism"),
        ("--ep", [1], "degrees of expert parallelism"),
        ("--gpus", None, "numbers of GPUs, filled with replicas (default: one replica)"),
        ("--batch", [1, 16, 64], "sequences that a replica serves at once"),
        ("--context", [1024], "tokens of each sequence"),
    )
    parser.add_argument("--chunk", type=count, default=8192, help="tokens in one pass of prefill")
    parser.add_argument(
        "--format", type=_words, default=list(_FORMATS), metavar="NAME,...", help="formats of "
        f"weights: {', '.join(_FORMATS)}",
    )  # fmt: skip
    parser.add_argument(
        "--group", type=group_size, default=128, metavar="SIZE", help="group size of int4 along "
        'K, or "column" (default: 128, closest to the adaptive rule)',
    )  # fmt: skip
    parser.add_argument(
        "--head-bits", type=int, choices=(4, 8), default=8, help="bits of the output head with int4"
    )
    parser.add_argument("--json", metavar="FILE", help="also write every figure as JSON")
    parser.add_argument("--html", metavar="FILE", help="also write a page with plots")
    parser.add_argument("--formulas", action="store_true", help="also print the formulas")


def _add_devices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", type=_words, default=["h200"], metavar="NAME,...",
        help=f"GPUs: {', '.join(DEVICES)}",
    )  # fmt: skip
    parser.add_argument("--machine", type=count, default=8, help="GPUs in one machine")
    parser.add_argument(
        "--network", type=float, default=50.0, metavar="GB/s", help="rate between machines, of "
        "each GPU in one direction (default: 50, which is 400 Gb/s)",
    )  # fmt: skip
    parser.add_argument(
        "--price", metavar="PRICE | NAME=PRICE,...",
        help="price of a GPU for an hour, for all or by name",
    )  # fmt: skip


def _add_lists(
    parser: argparse.ArgumentParser, *options: tuple[str, list[int] | None, str]
) -> None:
    for flag, default, text in options:
        parser.add_argument(flag, type=counts, default=default, metavar="N,...", help=text)


def run(arguments: argparse.Namespace) -> None:
    question = _question(arguments)
    total = count_of(question)
    found = list(tqdm(estimates(question), "estimate", total=total, disable=None, leave=False))
    about = (question.devices.values(), question.formats, question.cluster, question.workloads)
    assumed = assumptions(*about)
    print(estimates_text(found))
    print("\nBy arithmetic, nothing was measured:", *(f"- {line}" for line in assumed), sep="\n")
    if arguments.formulas:
        print(f"\n{general_text()}")
        for model, device in product(question.models, question.devices.values()):
            print(f"\n{formulas_text(model, question.formats[-1], device)}")
    if arguments.json:
        content = json.dumps(estimates_as_dict(found, assumed), indent=2)
        replace_text(Path(arguments.json), content + "\n")
    if arguments.html:
        replace_text(Path(arguments.html), _page(found, assumed))


def _question(arguments: argparse.Namespace) -> Question:
    group = None if arguments.group == "column" else arguments.group
    known = formats(group, arguments.head_bits)
    wrong = [name for name in arguments.format if name not in known]
    if wrong:
        raise EstimateError(
            f"no format is called {wrong[0]!r}; there are {', '.join(known)}"
            f"{nearest(wrong[0], known)}"
        )
    if not 0 < arguments.network < float("inf"):
        raise EstimateError(f"--network {arguments.network:g}: give GB/s, more than 0, such as 50")
    loads = [Workload(*both) for both in product(arguments.batch, arguments.context)]
    return Question(
        models=[read_decoder(model) for model in arguments.model],
        devices={name: device_called(name) for name in arguments.gpu},
        sharings=[Sharing(*both) for both in product(arguments.tp, arguments.ep)],
        workloads=[replace(load, chunk=arguments.chunk) for load in loads],
        formats=[known[name] for name in arguments.format],
        cluster=Cluster(arguments.machine, 1e9 * arguments.network),
        total_gpus=arguments.gpus or (None,),
        prices=_prices(arguments.price, arguments.gpu),
    )


def _prices(text: str | None, names: list[str]) -> dict[str, float]:
    """From "2.5" or "h200=3.5,l40s=1"."""
    if text is None:
        return {}
    parts = text.split(",")
    if len(parts) == 1 and "=" not in text:
        return dict.fromkeys(names, _price(text))
    prices = {}
    for part in parts:
        name, _, price = part.partition("=")
        if name not in names:
            raise EstimateError(f"--price {part}: no GPU of this estimate is called {name!r}")
        prices[name] = _price(price)
    return prices


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < float("inf"):
        raise EstimateError(f"--price {text!r}: give what an hour of a GPU costs, such as 2.5")
    return price


def _words(text: str) -> list[str]:
    return text.split(",")


_GB = 1e9
_HEADERS = (
    *("GPU", "GPUs", "tp", "ep", "batch", "context", "weights in", "weights GB", "KV GB"),
    *("other GB", "of what is usable", "decode tok/s", "ms per token", "communication"),
    *("prefill tok/s", "µs per token", "communication", "cost of 1M decoded", "of 1M read"),
)


def _page(estimates: Sequence[Estimate], assumed: Sequence[str]) -> str:
    """The HTML page."""
    models: dict[str, list[Estimate]] = {}
    for estimate in estimates:
        models.setdefault(estimate.model.name, []).append(estimate)
    sections = [Section(name, _model_html(found)) for name, found in models.items()]
    sections.append(Section("assumptions", unordered(assumed)))
    fit = sum(estimate.fits for estimate in estimates)
    facts = [
        (str(len(estimates)), "combinations"),
        (str(fit), "of them fit"),
        ("by arithmetic", "nothing here was measured"),
    ]
    return render_page("fqcompile estimate", [], facts, sections)


def _model_html(found: Sequence[Estimate]) -> str:
    parts = []
    running = [(e, e.decode) for e in found if e.decode is not None]
    if running:
        parts.append(f'<div class="plots">{_plot(running)}</div>')
        parts.append(_legend(found))
    else:
        parts.append(paragraph("none of these ways fits"))
    possible = [estimate for estimate in found if estimate.refusal is None]
    if possible:
        rows = tuple(_cells(estimate) for estimate in possible)
        parts.append(table_html(Table(found[0].model.name, _HEADERS, rows).without_empty()))
    refused = dict.fromkeys(estimate.refusal for estimate in found if estimate.refusal)
    if refused:
        parts.append(unordered(reason for reason in refused if reason))
    return "\n".join(parts)


def _legend(found: Sequence[Estimate]) -> str:
    names = {estimate.form.bits: estimate.form.name for estimate in found}
    keys = "".join(f'<span class="key bits{bits}"></span>{name} ' for bits, name in names.items())
    return f'<p class="quiet">{keys}</p>'


def _plot(running: Sequence[tuple[Estimate, Speed]]) -> str:
    """Decoding: latency per token against throughput per GPU."""
    waits = [1e3 * seconds_of_a_token(*pair) for pair in running]
    rates = [e.tokens_per_second(speed) / e.gpus for e, speed in running]
    labels = _labels([estimate for estimate, _ in running])
    points = [
        Point(x, y, _title(e, x, y), f"bits{e.form.bits}", label=label)
        for (e, _), x, y, label in zip(running, waits, rates, labels, strict=True)
    ]
    best = max(points, key=lambda point: point.y)
    return points_svg(
        points,
        _from_zero("milliseconds per token", waits),
        _from_zero("decoded tokens per second and GPU", rates),
        f"decoding, {len(points)} ways; the most tokens per GPU: {best.title}",
    )


def _from_zero(title: str, values: Sequence[float]) -> Axis:
    return axis_over(title, values, from_zero=True)


def _labels(running: Sequence[Estimate]) -> list[str]:
    """For each estimate its format, and what else they differ in."""
    told = [
        (
            e.form.name,
            f"{e.gpus} {e.device_name}",
            f"tp {e.sharing.tp}",
            f"ep {e.sharing.ep}",
            f"batch {e.load.batch}",
            f"context {e.load.context}",
        )
        for e in running
    ]
    differ = [i for i, column in enumerate(zip(*told, strict=True)) if i == 0 or len({*column}) > 1]
    return [", ".join(row[i] for i in differ) for row in told]


def _title(estimate: Estimate, wait: float, rate: float) -> str:
    sharing, load = estimate.sharing, estimate.load
    return (
        f"{estimate.form.name} on {estimate.gpus} {estimate.device_name}, tp {sharing.tp}, "
        f"ep {sharing.ep}, batch {load.batch}, context {load.context}\n"
        f"{wait:.2f} ms per token, {rate:.1f} tokens per second and GPU"
    )


def _cells(estimate: Estimate) -> tuple[Cell, ...]:
    memory, sharing, load = estimate.memory, estimate.sharing, estimate.load
    assert memory is not None, "what is possible has its bytes"
    share = memory.total / memory.usable
    counts = (estimate.gpus, sharing.tp, sharing.ep, load.batch, load.context)
    sizes = (memory.weights, memory.kv, memory.activations)
    return (
        Cell(estimate.device_name),
        *(Cell(str(count), count) for count in counts),
        Cell(estimate.form.name),
        *(Cell(f"{size / _GB:.1f}", size) for size in sizes),
        Cell(f"{share:.0%}", share, shares=(1.0, share)),
        *_speed_cells(estimate, estimate.decode, 1e3),
        *_speed_cells(estimate, estimate.prefill, 1e6),
        _cost_cell(estimate, estimate.decode),
        _cost_cell(estimate, estimate.prefill),
    )


def _speed_cells(estimate: Estimate, speed: Speed | None, units: float) -> tuple[Cell, ...]:
    if speed is None:
        return Cell("does not fit", bad=True), Cell(""), Cell("")
    rate, wait = estimate.tokens_per_second(speed), units * seconds_of_a_token(estimate, speed)
    share = speed.communication_share
    return Cell(f"{rate:,.0f}", rate), Cell(f"{wait:.2f}", wait), Cell(f"{share:.0%}", share)


def _cost_cell(estimate: Estimate, speed: Speed | None) -> Cell:
    cost = None if speed is None else estimate.cost_of_a_million(speed)
    return Cell("") if cost is None else Cell(f"{cost:.3f}", cost)

"""fqcompile plan: memory, speed and cost of a model on GPUs that need not be here."""

import argparse
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

from tqdm import tqdm

from fqcompile.commands.argument_types import counts, group_size
from fqcompile.errors import PlannerError
from fqcompile.planner.assumptions import assumptions
from fqcompile.planner.communication import Cluster
from fqcompile.planner.devices import DEVICES, device_called
from fqcompile.planner.estimate import Question, count_of, estimates
from fqcompile.planner.formulas import formulas_text, general_text
from fqcompile.planner.model_shapes import named_models, read_decoder
from fqcompile.planner.plan_page import plan_page
from fqcompile.planner.plan_table import plan_as_dict, plan_text
from fqcompile.planner.sharding import Sharing
from fqcompile.planner.weight_format import formats
from fqcompile.planner.workload import Workload
from fqcompile.report.files import replace_text

_FORMATS = ("bf16", "int8", "int4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models, devices, ways to share them out, what is asked of them, and where to write it."""
    parser.add_argument(
        "--model", nargs="+", required=True, metavar="MODEL", help="a config.json, a directory "
        f"with one, or {', '.join(named_models())}",
    )  # fmt: skip
    parser.add_argument(
        "--gpu", type=_words, default=["h200"], metavar="NAME,...", help=f"of {', '.join(DEVICES)}"
    )
    parser.add_argument("--tp", type=counts, default=[1], metavar="N,...", help="tensor parallel")
    parser.add_argument("--ep", type=counts, default=[1], metavar="N,...", help="expert parallel")
    parser.add_argument(
        "--gpus", type=counts, metavar="N,...", help="GPUs there are, for replicas side by side "
        "(default: one replica)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=counts, default=[1, 16, 64], metavar="N,...", help="sequences of a replica"
    )
    parser.add_argument(
        "--context", type=counts, default=[1024], metavar="N,...", help="tokens of each"
    )
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a prefill's pass")
    parser.add_argument("--format", type=_words, default=list(_FORMATS), metavar="bf16,int8,int4")
    parser.add_argument(
        "--group", type=group_size, default=128, help='of int4, along K, or "column" (default: '
        "128, of which the adaptive rule's bits are closest)",
    )  # fmt: skip
    parser.add_argument("--head-bits", type=int, choices=(4, 8), default=8, help="with int4")
    parser.add_argument("--machine", type=int, default=8, help="GPUs of a machine")
    parser.add_argument(
        "--network", type=float, default=50.0, metavar="GB/s", help="of each GPU, one direction, "
        "between machines (default: 50, which is 400 Gb/s)",
    )  # fmt: skip
    parser.add_argument(
        "--price", metavar="PRICE | NAME=PRICE,...", help="of an hour of a GPU: for all or by name"
    )
    parser.add_argument("--json", metavar="FILE", help="also write every figure as JSON")
    parser.add_argument("--html", metavar="FILE", help="also write a page with plots")
    parser.add_argument("--formulas", action="store_true", help="also print what is computed")


def run(arguments: argparse.Namespace) -> None:
    question = _question(arguments)
    total = count_of(question)
    found = list(tqdm(estimates(question), "plan", total=total, disable=None, leave=False))
    about = (question.devices.values(), question.formats, question.cluster, question.workloads)
    assumed = assumptions(*about)
    print(plan_text(found))
    print("\nBy arithmetic, nothing was measured:", *(f"- {line}" for line in assumed), sep="\n")
    if arguments.formulas:
        print(f"\n{general_text()}")
        for model, device in product(question.models, question.devices.values()):
            print(f"\n{formulas_text(model, question.formats[-1], device)}")
    if arguments.json:
        content = json.dumps(plan_as_dict(found, assumed), indent=2)
        replace_text(Path(arguments.json), content + "\n")
    if arguments.html:
        replace_text(Path(arguments.html), plan_page(found, assumed))


def _question(arguments: argparse.Namespace) -> Question:
    group = None if arguments.group == "column" else arguments.group
    known = formats(group, arguments.head_bits)
    wrong = [name for name in arguments.format if name not in known]
    if wrong:
        raise PlannerError(f"no format is called {wrong[0]!r}; there are {', '.join(known)}")
    if arguments.machine < 1 or not arguments.network > 0:
        raise PlannerError("--machine is at least 1, and --network more than 0")
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
            raise PlannerError(f"--price {part}: no GPU of this plan is called {name!r}")
        prices[name] = _price(price)
    return prices


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < float("inf"):
        raise PlannerError(f"--price {text!r}: give what an hour of a GPU costs, such as 2.5")
    return price


def _words(text: str) -> list[str]:
    return text.split(",")

"""What becomes of experts in every form that models write them: sites, share of bytes, error.

    python -m bench expert_forms [--dtype fp32] [--json FILE]

Small random models, compiled as one graph (`fullgraph=True`); the rewritten graph runs eagerly. The
error is the largest difference of the logits from the model with dequantised weights, relative to
the largest logit; beside it that from the original model, which is what int4 costs untrained
weights. Nothing is timed.
"""

import argparse
import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fqcompile
from bench.core.identity import identity
from bench.core.results import Results
from tests.moe_models import LAYERS_OF_OUR_OWN, MODELS, VOCAB, WIDTH, build, expert_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADERS = ("model", "form", "stacks", "share of bytes", "max error", "of the original")


class Row(NamedTuple):
    """`stacks`: of experts that are quantised, of all; errors are relative to the largest logit."""

    model: str
    form: str
    stacks: str
    share: float
    error: float
    original: float


def row(
    name: str,
    form: str,
    model: nn.Module,
    run: Callable[[Any], Tensor],
    prepare: Callable[[Any], None] = lambda model: None,
) -> Row:
    """One model in one form; `prepare` puts a copy of the model into that form."""
    torch._dynamo.reset()
    before = len(fqcompile.reports())
    options: dict[str, Any] = {"inner_backend": "eager", "min_elements": 4096}
    with torch.no_grad():
        actual = run(torch.compile(model, backend="finequant", fullgraph=True, options=options))
        (report,) = fqcompile.reports()[before:]
        oracle = fqcompile.fake_quantize_(copy.deepcopy(model), report)
        prepare(oracle)
        expected, original = run(oracle), run(model)
    done = {site.name for site in report.plan.quantized}
    stacks = expert_weights(model) or {s.name: None for s in report.sites if "expert" in s.name}
    found = sum(stack in done for stack in stacks)
    quantized = sum(site.bytes_before for site in report.plan.quantized)
    return Row(
        name,
        form,
        f"{found}/{len(stacks)}",
        quantized / sum(p.nbytes for p in model.parameters()),
        float((actual - expected).abs().max() / expected.abs().max()),
        float((actual - original).abs().max() / original.abs().max()),
    )


def rows(dtype: torch.dtype) -> list[Row]:
    """Every model in each of its forms."""
    ids = torch.randint(1, VOCAB, (2, 5), generator=torch.Generator().manual_seed(7))
    found = []
    for name in MODELS:
        for form in ["bmm [E, C, K]"] if name == "llama4" else ["grouped_mm", "batched_mm"]:

            def prepare(model: Any, form: str = form) -> None:
                if "_mm" in form:
                    model.set_experts_implementation(form)

            model = build(name, dtype, form)
            found.append(row(name, form, model, lambda m: m(ids, use_cache=False).logits, prepare))
    x = torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(7)).to(dtype)
    for name, layer in LAYERS_OF_OUR_OWN.items():
        model = layer().to(dtype).eval().requires_grad_(False)
        found.append(row("a layer", name, model, lambda m: m(x)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench expert_forms", description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    results = Results(identity(torch.device("cpu")), {"dtype": arguments.dtype}, arguments.json)
    found = rows(DTYPES[arguments.dtype])
    results.add(*(r._asdict() for r in found))
    table = [
        (r.model, r.form, r.stacks, f"{r.share:.1%}", f"{r.error:.1e}", f"{r.original:.3f}")
        for r in found
    ]
    print(tabulate(table, HEADERS, disable_numparse=True))


if __name__ == "__main__":
    main()

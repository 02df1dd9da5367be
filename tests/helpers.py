"""What whole-model tests share: small modules, cheap compilation, the oracle, and a tolerance."""

import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

import fqcompile
from fqcompile.passes.op_nodes import is_linear, is_quantized
from fqcompile.passes.summary import SiteRecipe
from fqcompile.report import CompileReport, Plan, Site
from fqcompile.weights.store import STORE

# Half the distance of two neighboring floats around one: the most one rounding changes.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class InnerGraphs:
    """The inner backend "fqtest_spy": keeps each rewritten graph, and its packed inputs weakly."""

    def __init__(self) -> None:
        self.modules: list[fx.GraphModule] = []
        self.packed: list[tuple[weakref.ref[Tensor], ...]] = []

    def __call__(self, module: fx.GraphModule, args: Sequence[Any]) -> Callable[..., Any]:
        nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
        packed = [a for n, a in zip(nodes, args, strict=True) if n.name.startswith("fq_")]
        self.modules.append(module)
        self.packed.append(tuple(map(weakref.ref, packed)))
        return module.forward

    def packed_of_experts(self, graph: int) -> list[Tensor]:
        """Codes and scales that the graph's grouped and gathered matmuls read."""
        nodes = self.modules[graph].graph.nodes
        inputs = [n for n in nodes if n.op == "placeholder" and n.name.startswith("fq_")]
        tensors = dict(zip(inputs, self.packed[graph], strict=True))
        ops = [n for n in nodes if is_quantized(n) and not is_linear(n)]
        found = [tensors[arg]() for op in ops for arg in op.args[1:3]]
        return [t for t in found if t is not None]

    def linears(self) -> list[fx.Node]:
        """Every quantized matmul of every graph."""
        return [n for module in self.modules for n in module.graph.nodes if is_quantized(n)]


def finequant(
    model: Any, *, fullgraph: bool = True, dynamic: bool | None = None, **options: Any
) -> Any:
    """torch.compile with our backend; the rewritten graph runs as it is unless options say else."""
    return torch.compile(
        model,
        backend="finequant",
        fullgraph=fullgraph,
        dynamic=dynamic,
        options={"inner_backend": "eager", **options},
    )


def tolerance(dtype: torch.dtype, *, k: int = 128, depth: int = 1) -> float:
    """How far two correct results may lie apart, relative to the largest element.

    fp32: a dot product of K terms in another order differs by at most K·u of its terms' magnitudes,
    and `depth` such products follow each other: depth·K·u.
    fp16, bf16: sums are kept in fp32, so what differs is how often a result is rounded to u, at
    most twice per product (its result, and an activation or residual after it) and on both sides.
    Roundings are independent, so their errors add in quadrature, and the worst of thousands of
    elements lies within four standard deviations (u/√3 each, and the largest element is itself
    about four deviations of the result): √(4·depth)·u · 4/4, plus one u for the last rounding.
    """
    unit = UNIT[dtype]
    if dtype == torch.float32:
        return depth * k * unit
    return ((4 * depth) ** 0.5 + 1) * unit


def assert_close(
    actual: Tensor, expected: Tensor, *, k: int = 128, depth: int = 1, what: str = "result"
) -> None:
    """Same shape, dtype and, within `tolerance` of the largest element, values; names the worst."""
    for quality in ("shape", "dtype"):
        found, wanted = getattr(actual, quality), getattr(expected, quality)
        assert found == wanted, f"{what}: {quality} {found}, expected {wanted}"
    if not expected.numel():
        return
    assert bool(expected.isfinite().all()), f"{what}: the expected result itself is not finite"
    bound = tolerance(expected.dtype, k=k, depth=depth)
    error = (actual.double() - expected.double()).abs() / expected.double().abs().max()
    worst = int(error.nan_to_num(nan=torch.inf).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape))
    assert error.flatten()[worst] <= bound, (
        f"{what}: {actual[index].item()} at {index} where {expected[index].item()} is expected: "
        f"{error.flatten()[worst].item():.3g} of the largest element, allowed {bound:.3g}"
    )


def report() -> CompileReport:
    """The report of the one graph that was compiled."""
    found = fqcompile.reports()
    assert len(found) == 1, [f"{r.graph}: {r.warnings}" for r in found]
    return found[0]


def quantized_names(sites: Iterable[Site]) -> set[str]:
    return {site.name for site in sites if site.status == "quantized"}


def oracle(model: nn.Module, plan: Any = None) -> nn.Module:
    """A copy of the model with the dequantized values of `plan` (the newest report's) in it.

    The report is of the first instance that ran the graph; each is calibrated for itself.
    """
    plan = plan or fqcompile.reports()[-1]
    plan = getattr(plan, "plan", plan)
    own = Plan(tuple(_of_instance(model, site) for site in plan.sites), plan.options)
    return fqcompile.fake_quantize_(copy.deepcopy(model), own)


def _of_instance(model: nn.Module, site: Site) -> Site:
    recipe, held = site.recipe, dict(model.named_parameters(remove_duplicate=False))
    if not isinstance(recipe, SiteRecipe) or recipe.plan.asked is None:
        return site
    weights = tuple(held[name] for name in recipe.names if name in held)
    if len(weights) < len(recipe.names):
        return site
    own = STORE.calibration(recipe.recipe, weights, recipe.plan.asked)
    calibration = own or recipe.plan.calibration
    return site.but(recipe=replace(recipe, plan=replace(recipe.plan, calibration=calibration)))


def assert_quantized_like_oracle(
    model: nn.Module, actual: Tensor, run: Callable[[nn.Module], Tensor], **bounds: Any
) -> None:
    """`actual` is what the fake-quantized model computes, and not what the model itself does."""
    expected = run(oracle(model))
    assert_close(actual, expected, **bounds)
    assert_not_dense(actual, expected, run(model))


def assert_not_dense(actual: Tensor, expected: Tensor, dense: Tensor) -> None:
    """`actual` is nearer to what it should be than to `dense`, which has no quantized weights.

    How much 4 or 8 bits change depends on the model: its embeddings may be most of the result.
    """
    rounding, quantization = ((actual - y).double().norm().item() for y in (expected, dense))
    assert quantization > max(rounding, 1e-3 * dense.double().norm().item()), (
        f"the result is the unquantized model's ({quantization:.2g} from it, {rounding:.2g} apart)"
    )


class EveryForm(nn.Module):
    """One constant weight per way of writing a linear layer; each result keeps x's last size."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.size = size
        self.forms: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
            "linear": lambda x, w, b: nn.functional.linear(x, w, b),
            "operator": lambda x, w, b: x @ w,
            "matmul": lambda x, w, b: torch.matmul(x, w) + b,
            "mm": lambda x, w, b: torch.mm(x.flatten(0, 1), w).view(x.shape),
            "addmm": lambda x, w, b: torch.addmm(b, x.view(-1, size), w).view(x.shape),
            "bmm": lambda x, w, b: torch.bmm(x, w.expand(x.shape[0], -1, -1)),
            "baddbmm": lambda x, w, b: torch.baddbmm(b, x, w[None].expand(x.shape[0], -1, -1)),
            "einsum": lambda x, w, b: torch.einsum("bsk,nk->bsn", x, w),
            "einsum_heads": lambda x, w, b: (
                torch.einsum("bsd,dhk->bhsk", x, w.view(size, 4, -1)).transpose(1, 2).flatten(2)
            ),
            "einsum_merge": lambda x, w, b: torch.einsum(
                "...hk,hkd->...d", x.unflatten(-1, (4, -1)), w.view(4, -1, size)
            ),
            "einsum_left": lambda x, w, b: torch.einsum("nk,b s k -> bsn", w, x),
            "left": lambda x, w, b: (w @ x.mT).mT,
            "mv": lambda x, w, b: x + torch.mv(w, x[0, 0]),
            "transposed": lambda x, w, b: x @ w.t(),
            "slice": lambda x, w, b: nn.functional.pad(x @ w[:, : size // 2], (0, size // 2)),
            "cast": lambda x, w, b: nn.functional.linear(x, w.to(x.dtype).contiguous()),
            "chunks": lambda x, w, b: sum(
                nn.functional.linear(part, half)
                for part, half in zip(x.chunk(2, -1), w.chunk(2, 1), strict=True)
            ),
        }
        weights = {name: torch.randn(size, size) / size**0.5 for name in self.forms}
        self.weights = nn.ParameterDict(weights)
        self.parts = nn.ParameterList(torch.randn(size // 4, size) / size**0.5 for _ in range(4))
        self.bias = nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        results = {name: f(x, self.weights[name], self.bias) for name, f in self.forms.items()}
        results["cat"] = nn.functional.linear(x, torch.cat(list(self.parts)), self.bias)
        return results


class Mlp(nn.Module):
    """Two linears (up, down) around a gelu, with biases: wide enough to be quantized by default."""

    def __init__(self, width: int = 128, hidden: int = 256, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


def frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)

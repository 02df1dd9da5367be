"""What property tests draw: weights, matmul problems, and small programs with linear sites."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from fqcompile.kernels import op

WEIGHT_KINDS = ("gaussian", "outlier", "zeros", "zero rows", "denormal", "equal")
HIDDEN = 64
_UNROUTED = (None, None, False)


def matmul(*arguments: Any) -> Tensor:
    """The operator; for one matrix where no routing is given."""
    y: Tensor = op.matmul(*arguments, *_UNROUTED[len(arguments) - 13 :])
    return y


def opcheck_matmul(*arguments: Any) -> None:
    """PyTorch's checks of the operator, given these."""
    torch.library.opcheck(op.matmul, (*arguments, *_UNROUTED[len(arguments) - 13 :]))


def make_weight(kind: str, n: int, k: int, seed: int) -> Tensor:
    """A float32 matrix [n, k] of one of WEIGHT_KINDS."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    if kind == "outlier":
        w[seed % n, seed % k] = 300.0
    elif kind == "zeros":
        w.zero_()
    elif kind == "zero rows":
        w[::2] = 0
    elif kind == "denormal":
        w *= 1e-40
    elif kind == "equal":
        w.fill_(0.37)
    return w


@st.composite
def weights(draw: st.DrawFn, max_n: int = 40, max_k: int = 100) -> Tensor:
    """A weight with outliers, zeros or denormals, with sides from 1 and odd ones."""
    n = draw(st.one_of(st.sampled_from([1, 2, 3, 7]), st.integers(1, max_n)), label="n")
    k = draw(st.one_of(st.sampled_from([1, 2, 3, 33]), st.integers(1, max_k)), label="k")
    kind = draw(st.sampled_from(WEIGHT_KINDS), label="kind")
    return make_weight(kind, n, k, draw(st.integers(0, 999), label="seed"))


@dataclass(frozen=True)
class Problem:
    """The arguments of one fqcompile::matmul, by the schema's names."""

    x: Tensor
    qweight: Tensor
    scale: Tensor
    bias: Tensor | None
    residual: Tensor | None
    bits: int
    levels: str
    group_size: int
    n: int
    k: int
    activation: str
    gated: bool

    @property
    def arguments(self) -> tuple[object, ...]:
        return tuple(vars(self).values())


def random_codes(bits: int, rows: int, k: int, generator: torch.Generator) -> Tensor:
    """Every storage byte is legal: codes need no quantizer to be drawn."""
    if bits == 8:
        return torch.randint(-128, 128, (rows, k), dtype=torch.int8, generator=generator)
    return torch.randint(0, 256, (rows, -(-k // 2)), dtype=torch.uint8, generator=generator)


def make_problem(
    *,
    leading: tuple[int, ...] = (3,),
    n: int = 5,
    k: int = 40,
    bits: int = 4,
    levels: str = "uniform",
    group_size: int = 32,
    activation: str = "none",
    gated: bool = False,
    bias: bool = False,
    residual: bool = False,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype | None = None,
    strided: bool = False,
    seed: int = 0,
) -> Problem:
    """A problem whose results have about unit variance; `strided` makes x and residual views."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * n if gated else n

    def normal(*shape: int) -> Tensor:
        if strided and len(shape) > 1:
            wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)
            return wide.to(dtype)[..., ::2]
        return torch.randn(*shape, generator=generator).to(dtype)

    groups = -(-k // group_size)
    scale = torch.rand(rows, groups, generator=generator) + 0.5
    scale[::3] *= -1
    scale /= 2 ** (bits - 1) * k**0.5
    return Problem(
        x=normal(*leading, k),
        qweight=random_codes(bits, rows, k, generator),
        scale=scale.to(scale_dtype or dtype),
        bias=normal(rows) if bias else None,
        residual=normal(*leading, n) if residual else None,
        bits=bits,
        levels=levels,
        group_size=group_size,
        n=n,
        k=k,
        activation=activation,
        gated=gated,
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any combination of format, shape (M 0 and 1, odd K, short last group), epilogue and types."""
    k = draw(st.one_of(st.integers(1, 5), st.sampled_from([33, 64, 96, 97])), label="k")
    bits = draw(st.sampled_from([4, 8]), label="bits")
    sides = st.one_of(st.sampled_from([0, 1]), st.integers(2, 5))
    leading = draw(st.lists(sides, max_size=3).map(tuple), label="leading")
    return make_problem(
        leading=leading,
        n=draw(st.integers(1, 9), label="n"),
        k=k,
        bits=bits,
        levels=draw(st.sampled_from(["uniform", "normal"][: 8 // bits]), label="levels"),
        group_size=draw(st.sampled_from([1, 3, 32, 64, k]), label="group_size"),
        activation=draw(
            st.sampled_from(["none", "relu", "gelu", "gelu_tanh", "silu"]), label="activation"
        ),
        gated=draw(st.booleans(), label="gated"),
        bias=draw(st.booleans(), label="bias"),
        residual=draw(st.booleans(), label="residual"),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="dtype"),
        scale_dtype=draw(st.sampled_from([None, torch.float32]), label="scale_dtype"),
        strided=draw(st.booleans(), label="strided"),
        seed=draw(st.integers(0, 999), label="seed"),
    )


@dataclass(frozen=True)
class Step:
    """One statement: `name` of STEPS on the earlier values a and b and the weight number w."""

    name: str
    a: int
    b: int
    w: int


Statement = Callable[["Program", Tensor, Tensor, int], Tensor]


def _iadd(m: "Program", a: Tensor, b: Tensor, w: int) -> Tensor:
    a += b
    return a


def _flat_mm(m: "Program", a: Tensor, b: Tensor, w: int) -> Tensor:
    return torch.mm(a.view(-1, HIDDEN), m.mats[w]).view(a.shape)


def _conv1d(m: "Program", a: Tensor, b: Tensor, w: int) -> Tensor:
    return torch.addmm(m.layers[w].bias, a.view(-1, HIDDEN), m.mats[w]).view(a.shape)


def _mlp(m: "Program", a: Tensor, b: Tensor, w: int) -> Tensor:
    return m.layers[w + 1 & 3](F.silu(m.layers[w](a)) * m.layers[w ^ 2](a))


def _full_bias(m: "Program", a: Tensor, b: Tensor, w: int) -> Tensor:
    flat = b.reshape(-1, HIDDEN)
    return torch.addmm(flat, a.reshape(-1, HIDDEN), m.mats[w]).reshape(a.shape)


def _autocast(m: "Program", a: Tensor, b: Tensor, w: int) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.layers[w](a)


LINEAR_STEPS: dict[str, Statement] = {
    "linear": lambda m, a, b, w: m.layers[w](a),
    "linear without bias": lambda m, a, b, w: F.linear(a, m.layers[w].weight),
    "matmul": lambda m, a, b, w: a @ m.mats[w],
    "left matmul": lambda m, a, b, w: (m.mats[w] @ a.mT).mT,
    "mm of flat": _flat_mm,
    "conv1d": _conv1d,
    "addmm with a full bias": _full_bias,
    "bmm expanded": lambda m, a, b, w: torch.bmm(a, m.mats[w].expand(a.shape[0], -1, -1)),
    "einsum": lambda m, a, b, w: torch.einsum("bsd,nd->bsn", a, m.layers[w].weight),
    "merged weight": lambda m, a, b, w: F.linear(
        a, torch.cat([m.layers[w].weight[:32], m.mats[w][32:]])
    ),
    "in a mode": _autocast,
    "mlp": _mlp,
}
OTHER_STEPS: dict[str, Statement] = {
    "add": lambda m, a, b, w: a + b,
    "add row": lambda m, a, b, w: a + m.layers[w].bias,
    "iadd": _iadd,
    "scaled add": lambda m, a, b, w: torch.add(a, b, alpha=0.5),
    "broadcast add": lambda m, a, b, w: a + b[:, :1],
    "gate": lambda m, a, b, w: F.silu(a) * b.tanh(),
    "relu": lambda m, a, b, w: torch.relu(a),
    "relu in place": lambda m, a, b, w: F.relu(a, inplace=True),
    "gelu": lambda m, a, b, w: F.gelu(a),
    "gelu tanh": lambda m, a, b, w: F.gelu(a, approximate="tanh"),
    "silu": lambda m, a, b, w: F.silu(a),
    "add in place": lambda m, a, b, w: a.add_(0.5),
    "scale in place": lambda m, a, b, w: a.mul_(0.5),
    "write a slice": lambda m, a, b, w: a[..., :2].fill_(0.25).sum() + a,
    "view": lambda m, a, b, w: a.view(-1, HIDDEN).view(a.shape),
    "own matmul": lambda m, a, b, w: a @ (b[0, :1].mT @ b[0, :1] / HIDDEN),
    "double": lambda m, a, b, w: F.linear(a.double(), m.mats[w].double()).float(),
}
STEPS = LINEAR_STEPS | OTHER_STEPS


class Program(nn.Module):
    """Statements over a growing list of values [B, S, HIDDEN], of which some are returned."""

    def __init__(self, steps: tuple[Step, ...], returned: tuple[int, ...], seed: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.mats = nn.ParameterList(torch.empty(HIDDEN, HIDDEN) for _ in range(4))
        self.steps, self.returned = steps, returned
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator).div_(HIDDEN**0.5)

    def values(self, x: Tensor, y: Tensor) -> list[Tensor]:
        values = [x, y]
        for step in self.steps:
            values.append(STEPS[step.name](self, values[step.a], values[step.b], step.w))
        return values

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        values = self.values(x, y)
        return tuple(values[i] for i in self.returned)

    def __repr__(self) -> str:
        lines = [f"v{i + 2} = {s.name}(v{s.a}, v{s.b}, w{s.w})" for i, s in enumerate(self.steps)]
        return "\n".join(["", *lines, f"return {', '.join(f'v{i}' for i in self.returned)}"])


@st.composite
def programs(draw: st.DrawFn, max_steps: int = 7) -> Program:
    """At least one linear; values are reused, so inputs are shared and results have many users."""
    count = draw(st.integers(1, max_steps), label="steps")
    steps = []
    for i in range(count):
        names = LINEAR_STEPS if i == 0 else STEPS
        # Recent values are drawn more often, so that patterns form; -1 is the last one.
        back = st.one_of(st.just(1), st.integers(1, i + 2))
        steps.append(
            Step(
                draw(st.sampled_from(sorted(names)), label="statement"),
                i + 2 - draw(back, label="a, counted from the end"),
                i + 2 - draw(st.integers(1, i + 2), label="b, counted from the end"),
                draw(st.integers(0, 3), label="weight"),
            )
        )
    extra = draw(st.lists(st.integers(0, count), max_size=2, unique=True), label="also returned")
    return Program(tuple(steps), (count + 1, *extra), draw(st.integers(0, 99), label="seed"))

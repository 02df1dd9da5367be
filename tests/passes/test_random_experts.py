"""Random small layers of experts through all passes, against themselves with dequantized stacks.

A projection in one of its forms, a bias, a unit and a second projection, with writes and second
readers in between: whatever the passes make of it has the same values, shapes and strides.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (defines the operator of grouped rows)
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.passes.graphs import assert_same, run_passes

K, N = 24, 16

Product = Callable[[Tensor, Tensor], Tensor]  # x and each row's matrix [.., N, K]
ROWS: dict[str, Product] = {
    "bmm left": lambda x, w: torch.bmm(w, x.unsqueeze(-1)).squeeze(-1),
    "bmm right": lambda x, w: torch.bmm(x.unsqueeze(1), w.mT).squeeze(1),
    "matmul": lambda x, w: (x[:, None] @ w.transpose(1, 2))[:, 0],
    "einsum": lambda x, w: torch.einsum("pk,pnk->pn", x, w),
    "einsum transposed": lambda x, w: torch.einsum("pnk,pk->np", w, x).t(),
    "baddbmm": lambda x, w: torch.baddbmm(x[:1, :1, None], w, x.unsqueeze(-1)).squeeze(-1),
}
TOKENS: dict[str, Product] = {
    "einsum of tokens": lambda x, w: torch.einsum("tak,tank->tan", x, w),
    "broadcast": lambda x, w: (x.unsqueeze(2) @ w.mT).squeeze(2),
    "left": lambda x, w: (w @ x.unsqueeze(-1)).squeeze(-1),
}
CAPACITY: dict[str, Product] = {
    "bmm": lambda x, w: torch.bmm(x, w.mT),
    "left": lambda x, w: (w @ x.mT).mT,
    "einsum": lambda x, w: torch.einsum("eck,enk->ecn", x, w),
    "einsum transposed": lambda x, w: torch.einsum("eck,enk->nce", x, w).permute(2, 1, 0),
}
FORMS = [
    *(("rows", name) for name in ROWS),
    *(("tokens", name) for name in TOKENS),
    *(("capacity", name) for name in CAPACITY),
    ("grouped", "offsets"),
]
SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "y + b": lambda y, b: y + b,
    "b + y": lambda y, b: b + y,
    "y.add_(b)": lambda y, b: y.add_(b),
    "y += b": lambda y, b: y.__iadd__(b),
}


def _oai(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


UNITS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y[..., :N],
    "relu": lambda y: torch.relu(y)[..., :N],
    "silu in place": lambda y: F.silu(y, inplace=True)[..., N:],
    "halves": lambda y: F.silu(y[..., :N]) * y[..., N:],
    "chunks": lambda y: (lambda g, u: u * F.gelu(g))(*y.chunk(2, -1)),
    "swapped halves": lambda y: F.silu(y[..., N:]) * y[..., :N],
    "interleaved": lambda y: F.silu(y[..., ::2]) * y[..., 1::2],
    "GPT-OSS": lambda y: _oai(y[..., ::2], y[..., 1::2]),
}


@dataclass(frozen=True)
class Draw:
    """One layer. `write` is what is changed in place after the stack was gathered, or before the
    bias; `reader` is who else reads the projection."""

    kind: str
    form: str
    experts: int
    tokens: int
    top_k: int
    transposed: bool
    stacks: str
    unit: str
    bias: str
    write: str
    reader: str
    down: bool
    seed: int


class Layer(nn.Module):
    """x [T, K], ids [T, top-k] -> [T, top-k, N], or rows sorted by expert; or x [E, C, K]."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw = draw
        generator = torch.Generator().manual_seed(draw.seed)

        def stack(n: int, k: int) -> nn.Parameter:
            w = torch.randn(draw.experts, n, k, generator=generator) / k**0.5
            return nn.Parameter(w.mT.contiguous() if draw.transposed else w, requires_grad=False)

        self.both, self.gate, self.up = stack(2 * N, K), stack(N, K), stack(N, K)
        self.down = stack(K, N)
        self.bias = nn.Parameter(torch.randn(draw.experts, 2 * N, generator=generator))
        self.bias.requires_grad_(False)

    def forward(self, x: Tensor, ids: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        draw, own = self.draw, ids.clone()
        if draw.kind == "rows":
            x, own = x[:, None].expand(-1, draw.top_k, -1).reshape(-1, K), own.view(-1)
        elif draw.kind == "tokens":
            x = x[:, None].expand(-1, draw.top_k, -1).contiguous()
        elif draw.kind == "grouped":
            own, order = torch.sort(own.view(-1))
            x = x[order // draw.top_k]
        read: list[Tensor] = []
        if draw.stacks == "merged":
            y = self.projection(x, self.both, own)
            y = self.with_bias(y, own, other, read)
            h = UNITS[draw.unit](y)
        else:
            gate, up = (self.projection(x, w, own) for w in (self.gate, self.up))
            h = F.silu(gate) * up
        if draw.write == "other before the last":
            other.mul_(0.5)
        return (self.projection(h, self.down, own) if draw.down else h, other, *read)

    def with_bias(self, y: Tensor, own: Tensor, other: Tensor, read: list[Tensor]) -> Tensor:
        draw = self.draw
        if draw.reader == "before":
            read.append(y.sin())
        if draw.write == "other":
            other.mul_(0.5)
        elif draw.write == "ids":
            own.mul_(0)
        if draw.bias in SUMS:
            capacity = draw.kind == "capacity"
            term = self.bias[:, None] if capacity else self.bias[own]
            if draw.write == "bias" and not capacity:
                term.mul_(0.5)
            y = SUMS[draw.bias](y, term)
        if draw.reader == "after":
            read.append(y.cos())
        return y

    def projection(self, x: Tensor, stack: Tensor, own: Tensor) -> Tensor:
        draw = self.draw
        if draw.kind == "grouped":
            counts = torch.histc(own.float(), bins=draw.experts, min=0, max=draw.experts - 1)
            offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
            w = stack if draw.transposed else stack.mT
            return torch.ops.transformers.grouped_mm_fallback(x, w, offs=offsets)
        w = stack if draw.kind == "capacity" else stack[own]
        if draw.write == "weights" and stack is not self.down and draw.kind != "capacity":
            w.mul_(0.5)
        w = w.mT if draw.transposed else w
        return {"rows": ROWS, "tokens": TOKENS, "capacity": CAPACITY}[draw.kind][draw.form](x, w)


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    """Fewer tokens than experts, none and one; negative ids where a gather reads them."""
    kind, form = draw(st.sampled_from(FORMS), label="form")

    def pick(label: str, *values: str) -> str:
        return draw(st.sampled_from(values), label=label)

    return Draw(
        kind=kind,
        form=form,
        experts=draw(st.sampled_from([1, 2, 3, 5]), label="experts"),
        tokens=draw(st.sampled_from([0, 1, 2, 3, 5, 9]), label="tokens"),
        top_k=draw(st.integers(1, 2), label="top-k"),
        transposed=draw(st.booleans(), label="[E, K, N]"),
        stacks=pick("stacks", "merged", "merged", "merged", "gate and up"),
        unit=pick("unit", *UNITS),
        bias=pick("bias", "none", *SUMS),
        write=pick(
            "written",
            *["nothing"] * 5,
            *("other", "other before the last", "ids", "bias", "weights"),
        ),
        reader=pick("also read", *["nowhere"] * 4, "before", "after"),
        down=draw(st.booleans(), label="down projection"),
        seed=draw(st.integers(0, 99), label="seed"),
    )


def check(draw: Draw, *, dynamic: bool) -> int:
    """Compile, run and compare; returns the number of fusions."""
    generator = torch.Generator().manual_seed(draw.seed + 100)
    rows = (draw.experts, draw.tokens) if draw.kind == "capacity" else (draw.tokens,)
    x = torch.randn(*rows, K, generator=generator)
    lowest = -draw.experts if draw.kind in ("rows", "tokens") else 0
    shape = (draw.tokens, draw.top_k)
    ids = torch.randint(lowest, draw.experts, shape, generator=generator)
    run = run_passes(Layer(draw), x, ids, torch.ones(3), dynamic=dynamic, granularity=8)
    parted = draw.write in ("weights", "ids") and draw.kind not in ("capacity", "grouped")
    assert run.ops["fq"] > 0 or parted, run.ops
    assert_same(run)
    return run.counts["fuse"]


@given(draw=draws(), dynamic=st.sampled_from([False, False, True]))
def test_experts_compute_what_their_dequantized_stacks_do(draw: Draw, dynamic: bool) -> None:
    event(f"{min(check(draw, dynamic=dynamic), 4)} fusions")


PLAIN = Draw(
    "rows", "einsum", 5, 3, 2, False, "merged", "halves", "none", "nothing", "nowhere", True, 0
)


@pytest.mark.parametrize(("kind", "form"), FORMS, ids=lambda name: name)
def test_every_form_alone(kind: str, form: str) -> None:
    """So that a form which no drawn layer reaches is not lost unseen."""
    check(Draw(**{**vars(PLAIN), "kind": kind, "form": form}), dynamic=False)

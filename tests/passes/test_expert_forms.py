"""match and rewrite of experts: every way of writing them, and what must not be taken for one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (defines the operator)
from torch import Tensor

from fqcompile.passes.op_nodes import argument
from fqcompile.passes.state import WeightSite, part_of
from tests.passes.graphs import Run, assert_same, dynamo_graph, run_passes

E, N, K, P = 5, 24, 40, 7
ENK = torch.randn(E, N, K, generator=torch.Generator().manual_seed(1)) / K**0.5
EKN = ENK.mT.contiguous()
HALVES = torch.randn(E, 2 * N, K, generator=torch.Generator().manual_seed(2)) / K**0.5
BIAS = torch.randn(E, N)
IDS = torch.tensor([3, 0, 3, 3, 1, 0, -1])
IDS2 = torch.tensor([[3, 0], [4, 4], [1, 2]])
OFFSETS = torch.tensor([1, 1, 4, 6, 7], dtype=torch.int32)
ROWS, TOKENS = torch.randn(P, K), torch.randn(3, K)
CAPACITY = torch.randn(E, 4, K)
GEC = torch.randn(2, E, 3, K)

Form = tuple[Callable[..., Tensor], Tensor, Tensor]
GATHERED: dict[str, Form] = {
    "bmm(w[i], x)": (lambda x, i: torch.bmm(ENK[i], x.unsqueeze(-1)).squeeze(-1), ROWS, IDS),
    "bmm(x, w[i])": (lambda x, i: torch.bmm(x.unsqueeze(1), EKN[i]).squeeze(1), ROWS, IDS),
    "x @ w[i]": (lambda x, i: (x[:, None] @ EKN[i])[:, 0], ROWS, IDS),
    "w[i] @ x": (lambda x, i: ENK[i] @ x[..., None], ROWS, IDS),
    "matmul": (lambda x, i: torch.matmul(x[:, None], ENK[i].transpose(1, 2)), ROWS, IDS),
    "mT": (lambda x, i: x[:, None] @ ENK[i].mT, ROWS, IDS),
    "permute": (lambda x, i: x[:, None] @ ENK[i].permute(0, 2, 1), ROWS, IDS),
    "one vector": (lambda x, i: ENK[i] @ x[0], ROWS, IDS),
    "baddbmm": (
        lambda x, i: torch.baddbmm(BIAS[i].unsqueeze(1), x.unsqueeze(1), EKN[i]).squeeze(1),
        ROWS,
        IDS,
    ),
    "index_select": (lambda x, i: torch.bmm(x[:, None], EKN.index_select(0, i % E)), ROWS, IDS),
    "torch.index_select": (
        lambda x, i: torch.bmm(x[:, None], torch.index_select(EKN, 0, index=i % E)),
        ROWS,
        IDS,
    ),
    "int32 ids": (lambda x, i: torch.bmm(x[:, None], EKN[i.int()]), ROWS, IDS),
    "contiguous": (lambda x, i: torch.bmm(x[:, None], ENK[i].mT.contiguous()), ROWS, IDS),
    "several rows": (lambda x, i: torch.bmm(x, EKN[i]), torch.randn(P, 3, K), IDS),
    "several rows, left": (lambda x, i: torch.bmm(ENK[i], x), torch.randn(P, K, 3), IDS),
    "einsum": (lambda x, i: torch.einsum("ti,taoi->tao", x, ENK[i]), TOKENS, IDS2),
    "einsum, x of each": (
        lambda x, i: torch.einsum("tao,taio->tai", x, EKN[i].mT.mT),
        torch.randn(3, 2, N),
        IDS2,
    ),
    "einsum, flat": (lambda x, i: torch.einsum("pk,pnk->pn", x, ENK[i]), ROWS, IDS),
    "einsum, weight first": (lambda x, i: torch.einsum("p n k, p k -> n p", ENK[i], x), ROWS, IDS),
    "broadcast x": (lambda x, i: x[:, None, None] @ EKN[i], TOKENS, IDS2),
    "gate of a fused gather": (
        lambda x, i: torch.einsum("pk,pnk->pn", x, HALVES[i].chunk(2, dim=1)[0]),
        ROWS,
        IDS,
    ),
    "up of a fused gather": (
        lambda x, i: torch.einsum("pk,pnk->pn", x, HALVES[i][:, N:]),
        ROWS,
        IDS,
    ),
    "narrow": (lambda x, i: ENK[i].narrow(1, 3, 9) @ x[..., None], ROWS, IDS),
    "view of a stack": (lambda x, i: torch.bmm(x[:, None], HALVES[:, N:].mT[i]), ROWS, IDS),
    "one id for all": (lambda x, i: x @ EKN[i], torch.randn(P, 1, 3, K), IDS[:1]),
}


def fallback(x: Tensor, offsets: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, ENK.mT, offs=offsets)


GROUPED: dict[str, Form] = {
    "fallback": (fallback, ROWS, OFFSETS),
    "fallback, int64": (fallback, ROWS, OFFSETS.long()),
    "bmm": (lambda x, _: torch.bmm(x, EKN), CAPACITY, OFFSETS),
    "@": (lambda x, _: x @ ENK.mT, CAPACITY, OFFSETS),
    "left": (lambda x, _: ENK @ x.mT, CAPACITY, OFFSETS),
    "baddbmm": (lambda x, _: torch.baddbmm(BIAS[:, None], x, EKN), CAPACITY, OFFSETS),
    "GShard": (lambda x, _: torch.einsum("gecm,emh->gech", x, EKN), GEC, OFFSETS),
    "GShard, experts first": (
        lambda x, _: torch.einsum("egcm,emh->egch", x.transpose(0, 1), EKN),
        GEC,
        OFFSETS,
    ),
    "Tutel": (
        lambda x, _: torch.matmul(x, ENK.permute(0, 2, 1)) + BIAS[:, None],
        CAPACITY,
        OFFSETS,
    ),
    "einsum, heads": (
        lambda x, _: torch.einsum("ecm,emhd->echd", x, EKN.view(E, K, 4, -1)),
        CAPACITY,
        OFFSETS,
    ),
    "einsum, experts last": (
        lambda x, _: torch.einsum("cem,nme->cen", x.transpose(0, 1), ENK.permute(1, 2, 0)),
        CAPACITY,
        OFFSETS,
    ),
}
ALL = {f"gathered, {k}": v for k, v in GATHERED.items()} | {
    f"grouped, {k}": v for k, v in GROUPED.items()
}


def experts(run: Run) -> tuple[WeightSite, str]:
    """The one site, and how the one operator's rows are told their experts."""
    (site,), (op,) = run.state.sites, run.linears
    return site, "ids" if argument(op, "offsets") is None else "offsets"


@pytest.mark.parametrize("name", ALL)
def test_form_becomes_one_op_and_computes_the_same(name: str) -> None:
    forward, x, routing = ALL[name]
    run = run_passes(lambda x, r: forward(x, r), x, routing, granularity=16)
    site, told = experts(run)
    assert told == ("ids" if name.startswith("gathered") else "offsets")
    assert site.kind == "experts" and site.shape[0] == E and site.plan is not None
    assert not {"bmm", "matmul", "einsum", "baddbmm", "_grouped_mm", "index_select"} & set(run.ops)
    assert_same(run)


@pytest.mark.few(12)
@pytest.mark.parametrize("name", ALL)
def test_form_with_symbolic_sizes_computes_the_same(name: str) -> None:
    forward, x, routing = ALL[name]
    run = run_passes(lambda x, r: forward(x, r), x, routing, dynamic=True, granularity=16)
    assert run.ops["fq"] == 1
    assert_same(run)


BF16: dict[str, Form] = {
    "_grouped_mm": (lambda x, o: torch._grouped_mm(x, ENK.bfloat16().mT, offs=o), ROWS, OFFSETS),
    "F.grouped_mm": (lambda x, o: F.grouped_mm(x, EKN.bfloat16(), offs=o), ROWS, OFFSETS),
    "keywords": (
        lambda x, o: torch._grouped_mm(
            x, EKN.bfloat16(), offs=o, bias=None, out_dtype=torch.bfloat16
        ),
        ROWS,
        OFFSETS,
    ),
    "one matrix of rows each": (
        lambda x, _: torch._grouped_mm(x, EKN.bfloat16()),
        CAPACITY,
        OFFSETS,
    ),
}


@pytest.mark.parametrize("name", BF16)
def test_grouped_mm_of_bf16(name: str) -> None:
    forward, x, offsets = BF16[name]
    run = run_passes(lambda x, o: forward(x, o), x.bfloat16(), offsets, granularity=16)
    assert experts(run)[1] == "offsets"
    (got,), (want,) = run.outputs(), run.expected()
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    # Both sum in fp32 or better and round once to bf16: a unit of the result, and one for its sum.
    assert float((got - want).abs().max()) <= 2 * 2**-8 * float(want.abs().max())


def test_weights_are_not_gathered_any_more() -> None:
    run = run_passes(lambda x, i: torch.bmm(ENK[i], x.unsqueeze(-1)).squeeze(-1), ROWS, IDS)
    assert run.ops == {"fq": 1}, "neither the gather nor the views around the product are left"
    assert argument(run.linears[0], "routing").op == "placeholder"


def test_gather_with_another_reader_stays() -> None:
    def forward(x: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        w = ENK[i]
        return torch.bmm(w, x.unsqueeze(-1)), w.sum()

    run = run_passes(forward, ROWS, IDS)
    assert (run.ops["fq"], run.ops["getitem"]) == (1, 1)
    assert run.outputs()[1].shape == ()


def test_grouped_and_gathered_forms_ask_for_one_packed_weight() -> None:
    """However the stack is transposed on its way, both name it by the same recipe."""
    forms = [GATHERED["bmm(w[i], x)"], GATHERED["mT"], GROUPED["fallback"], GROUPED["@"]]
    keys = set()
    for forward, x, routing in forms:
        run = run_passes(lambda x, r, f=forward: f(x, r), x, routing, until="plan")
        (site,) = run.state.sites
        assert site.plan is not None
        keys.add((site.shape, part_of(run.state, site, site.plan).key))
    assert len(keys) == 1


def test_two_projections_of_the_same_rows_share_their_arrangement() -> None:
    other = torch.randn(E, N, K) / K**0.5

    def forward(x: Tensor, i: Tensor) -> Tensor:
        gate = torch.einsum("ti,taoi->tao", x, ENK[i])
        return F.silu(gate) * torch.einsum("ti,taoi->tao", x, other[i])

    run = run_passes(forward, TOKENS, IDS2)
    (op,) = run.linears
    got = {n: argument(op, n) for n in ("activation", "gated", "n")}
    assert got == {"activation": "silu", "gated": True, "n": N}
    assert run.ops["expand"] == 1
    assert_same(run)


def test_expert_named_by_a_constant_is_a_linear() -> None:
    run = run_passes(lambda x: F.linear(x, ENK[2]) + F.linear(x, ENK[0]), TOKENS)
    assert [site.kind for site in run.state.sites] == ["linear", "linear"]
    assert [site.name for site in run.state.sites] == ["ENK[0]", "ENK[1]"]
    assert_same(run)


def test_autocast_casts_what_the_op_reads() -> None:
    def forward(x: Tensor, i: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.bmm(x.unsqueeze(1), EKN[i]).squeeze(1)

    run = run_passes(forward, ROWS, IDS)
    assert run.ops["fq"] == 1
    (got,), (want,) = run.outputs(), run.expected()
    assert got.dtype == want.dtype == torch.bfloat16
    # Both round ŵ's product once to bf16, and the expected one rounds x and ŵ before.
    assert float((got - want).abs().max()) <= 4 * 2**-8 * float(want.abs().max())


MASK = torch.tensor([True, False, True, True, False])
NEAR_MISSES: dict[str, tuple[Callable[..., object], tuple[Tensor, ...]]] = {
    "ids that are part of the model": (lambda x: torch.bmm(x[:, None], EKN[IDS]) + 0, (ROWS,)),
    "summed over experts": (
        lambda x, i: torch.einsum("ti,taoi->to", x, ENK[i]),
        (TOKENS, IDS2),
    ),
    "diagonal": (lambda x, i: torch.einsum("pk,pkk->pk", x, torch.ones(E, K, K)[i]), (ROWS, IDS)),
    "baddbmm with beta": (
        lambda x, i: torch.baddbmm(BIAS[i][:, None], x[:, None], EKN[i], beta=0.5),
        (ROWS, IDS),
    ),
    "integers": (
        lambda x, i: torch.bmm(x[:, None].long(), (EKN * 9).long()[i]),
        (ROWS, IDS),
    ),
    "weight that depends on x": (
        lambda x, i: torch.bmm(x[:, None], (EKN * x[0, 0])[i]),
        (ROWS, IDS),
    ),
    "two-dimensional stack": (lambda x, i: x * BIAS.repeat(1, 2)[i][:, :K], (ROWS, IDS)),
    "another dimension": (
        lambda x, i: torch.einsum("pk,epk->pe", x, ENK.index_select(1, i % E)),
        (ROWS, IDS),
    ),
}


@pytest.mark.parametrize("name", [n for n in NEAR_MISSES if n != "ids that are part of the model"])
def test_near_miss_is_not_taken_for_experts(name: str) -> None:
    forward, args = NEAR_MISSES[name]
    run = run_passes(forward, *args)
    assert not [site for site in run.state.sites if site.kind == "experts"]
    assert_same(run)


def test_ids_that_are_part_of_the_model_make_a_stack_of_their_own() -> None:
    """The gather of constants is folded: seven experts, of which some are equal."""
    forward, args = NEAR_MISSES["ids that are part of the model"]
    run = run_passes(forward, *args)
    assert [site.shape for site in run.state.sites] == [(P, N, K)]
    assert_same(run)


def test_stack_that_the_graph_writes_to_is_kept() -> None:
    stack = ENK.clone()

    def forward(x: Tensor, i: Tensor) -> Tensor:
        stack.mul_(1.0)
        return torch.bmm(stack[i], x.unsqueeze(-1))

    run = run_passes(forward, ROWS, IDS)
    assert run.ops["fq"] == 0
    assert [kept.reason for kept in run.state.kept] == ["'mul_' in the graph may write to it"]


def test_empty_batch_is_captured() -> None:
    captured = dynamo_graph(
        lambda x, i: torch.bmm(ENK[i], x.unsqueeze(-1)), torch.randn(0, K), IDS[:0]
    )
    assert captured.module is not None
    run = run_passes(lambda x, i: torch.bmm(ENK[i], x.unsqueeze(-1)), torch.randn(0, K), IDS[:0])
    assert run.outputs()[0].shape == (0, N, 1)

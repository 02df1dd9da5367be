"""match: every surface form of a linear layer is one site, and what only looks like one is none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fqcompile.passes.kept import CONVOLUTION, TABLE
from fqcompile.passes.products import PRODUCTS
from fqcompile.quant.choose import quantize_weight
from tests.helpers import assert_close
from tests.passes.graphs import assert_same, run_passes, weight

K, N = 64, 48
NK, KN = weight(N, K), weight(K, N)
SQUARE = weight(K, K)
BIAS = torch.randn(N)
X2, X3 = torch.randn(6, K), torch.randn(2, 3, K)


FORMS: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "F.linear": (lambda x: F.linear(x, NK), X3),
    "F.linear with bias": (lambda x: F.linear(x, NK, BIAS), X3),
    "F.linear by keyword": (lambda x: F.linear(input=x, weight=NK, bias=BIAS), X3),
    "F.linear of a vector": (lambda x: F.linear(x, NK, BIAS), X2[0]),
    "@": (lambda x: x @ KN, X3),
    "@ of a vector": (lambda x: x @ KN, X2[0]),
    "torch.matmul": (lambda x: torch.matmul(x, KN), X3),
    "torch.matmul by keyword": (lambda x: torch.matmul(x, other=KN), X3),
    "Tensor.matmul": (lambda x: x.matmul(NK.t()), X3),
    "torch.mm": (lambda x: torch.mm(x, KN), X2),
    "Tensor.mm": (lambda x: x.mm(KN), X2),
    "addmm": (lambda x: torch.addmm(BIAS, x, KN), X2),
    "addmm with a bias per row": (lambda x: torch.addmm(torch.ones(6, 1), x, KN), X2),
    "addmm of two activations and a weight": (lambda x: torch.addmm(x[:, :N], x, KN), X2),
    "weight on the left": (lambda x: NK @ x.mT, X3),
    "weight times a vector": (lambda x: torch.mv(NK, x), X2[0]),
    "weight @ vector": (lambda x: NK @ x, X2[0]),
    "addmm, weight on the left": (lambda x: torch.addmm(torch.ones(6), NK, x.t()), X2),
    "bmm, weight expanded": (lambda x: torch.bmm(x, KN.expand(2, -1, -1)), X3),
    "matmul by [1, K, N]": (lambda x: x @ KN.unsqueeze(0), X3),
    "baddbmm": (lambda x: torch.baddbmm(BIAS, x, KN.expand(2, K, N)), X3),
    "einsum of a plain linear": (lambda x: torch.einsum("bsd,nd->bsn", x, NK), X3),
    "einsum into heads": (lambda x: torch.einsum("bsd,dhk->bshk", x, KN.view(K, 4, 12)), X3),
    "einsum out of heads": (
        lambda x: torch.einsum("bshk,hkd->bsd", x.view(2, 3, 4, 16), SQUARE.view(4, 16, K)),
        X3,
    ),
    "einsum, weight first": (lambda x: torch.einsum("nd,...d->...n", NK, x), X3),
    "einsum, result permuted": (lambda x: torch.einsum("bsd,nd->nbs", x, NK), X3),
    "einsum with an implicit result": (lambda x: torch.einsum("ij,kj", x, NK), X2),
    "einsum, an ellipsis, implicit": (lambda x: torch.einsum("...j,jk", x, KN), X3),
    "einsum of lists": (lambda x: torch.einsum(x, [0, 1], NK, [27, 1], [0, 27]), X2),
    "einsum of lists, implicit": (lambda x: torch.einsum(x, [..., 9], NK, [3, 9]), X3),
    "tensordot": (lambda x: torch.tensordot(x, KN, dims=1), X3),
    "tensordot of dimensions": (lambda x: torch.tensordot(x, NK, dims=([-1], [1])), X3),
    "tensordot, weight first": (lambda x: torch.tensordot(NK, x, ([1], [2])), X3),
    "tensordot out of heads": (
        lambda x: torch.tensordot(x.view(2, 3, 4, 16), SQUARE.view(4, 16, K), dims=2),
        X3,
    ),
    "torch.inner": (lambda x: torch.inner(x, NK), X3),
    "Tensor.inner": (lambda x: x.inner(NK), X2),
    "linalg.matmul": (lambda x: torch.linalg.matmul(x, KN), X3),
    "addmm with beta": (lambda x: torch.addmm(BIAS, x, KN, beta=2), X2),
    "addmm with alpha": (lambda x: torch.addmm(torch.ones(6, 1), x, KN, alpha=0.5), X2),
    "addmm without its bias": (lambda x: torch.addmm(BIAS * torch.nan, x, KN, beta=0), X2),
    "addmv": (lambda x: torch.addmv(BIAS, NK, x), X2[0]),
    "addmv with both": (lambda x: torch.addmv(BIAS, NK, x, beta=3, alpha=-0.5), X2[0]),
    "baddbmm with both": (
        lambda x: torch.baddbmm(BIAS, x, KN.expand(2, K, N), beta=0.5, alpha=2),
        X3,
    ),
    "one x for all experts": (lambda x: x[:, None] @ SQUARE.view(4, 16, K).mT, X3[..., :K]),
    "one x, einsum": (
        lambda x: torch.einsum("bek,enk->ben", x[:, None], SQUARE.view(4, 16, K)),
        X2,
    ),
    "conv1d": (lambda x: F.conv1d(x.mT, NK[..., None]), X3),
    "conv1d with bias": (lambda x: F.conv1d(x.mT, NK[..., None], BIAS), X3),
    "conv2d": (
        lambda x: F.conv2d(x.view(1, K, 2, 3), NK[..., None, None], BIAS, padding=(0, 0)),
        X2,
    ),
    "conv2d, channels last": (
        lambda x: F.conv2d(x.view(2, 3, 1, K).permute(0, 3, 1, 2), NK[..., None, None]),
        X3,
    ),
    "weight transposed, cast, sliced": (lambda x: x @ SQUARE.t().to(torch.float32)[:, :N], X3),
    "weights joined": (lambda x: F.linear(x, torch.cat([NK, NK[:5]])), X3),
}


@pytest.mark.parametrize(("forward", "x"), FORMS.values(), ids=list(FORMS))
def test_form_is_one_site_and_computes_the_same(forward: Callable[..., Tensor], x: Tensor) -> None:
    run = run_passes(forward, x)
    assert run.counts["match"] == 1, run.state.matched
    assert run.counts["rewrite"] == 1
    assert not PRODUCTS & set(run.ops)
    assert_same(run)


SEVERAL: dict[str, tuple[Callable[..., Tensor], Tensor, list[str]]] = {
    "einsum of x, w and x": (
        lambda x: torch.einsum("bk,nk,bn->bn", x, NK, x[:, :N]), X2, ["NK"],
    ),
    "einsum of a scale": (
        lambda x: torch.einsum("bsk,n,kn->bsn", x, BIAS, KN), X3, ["KN"],
    ),
    "einsum of low rank": (
        lambda x: torch.einsum("nr,rk,...k->...n", NK, SQUARE, x), X3, ["SQUARE", "NK"],
    ),
    "einsum of four": (
        lambda x: torch.einsum("ar,kr,bk,b", NK, SQUARE, x, x[:, 0]), X2, ["SQUARE", "NK"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("forward", "x", "names"), SEVERAL.values(), ids=list(SEVERAL))
def test_each_weight_of_an_einsum_of_several_is_a_site(
    forward: Callable[..., Tensor], x: Tensor, names: list[str]
) -> None:
    run = run_passes(forward, x)
    assert [site.name for site in run.state.sites if site.plan is not None] == names
    assert_same(run)


def test_rows_of_a_normalized_weight_are_a_site() -> None:
    """As in margin losses and cosine classifiers."""
    run = run_passes(lambda x: F.linear(F.normalize(x), F.normalize(NK, dim=1)), X2)
    (site,) = run.state.sites
    assert site.plan is not None
    w_hat = quantize_weight(F.normalize(NK, dim=1), site.plan).dequantize(torch.float32)
    torch.testing.assert_close(run.outputs()[0], F.linear(F.normalize(X2), w_hat))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("utils", [torch.nn.utils, torch.nn.utils.parametrizations])
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_a_weight_that_a_norm_computes_is_a_site_in_evaluation_mode(utils: Any, name: str) -> None:
    torch.manual_seed(0)
    layer = getattr(utils, name)(torch.nn.Linear(K, N)).requires_grad_(False).eval()
    run = run_passes(layer, X2)
    (site,) = run.state.sites
    assert site.plan is not None
    layer(X2)  # the older ones compute the attribute in each call
    w_hat = quantize_weight(layer.weight.detach(), site.plan).dequantize(torch.float32)
    assert_close(run.outputs()[0], F.linear(X2, w_hat, layer.bias), k=K)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_convolution_of_many_pixels_stays_with_its_reason(dynamic: bool) -> None:
    def forward(x: Tensor) -> Tensor:
        return F.conv2d(x, NK[..., None, None], BIAS)

    few = run_passes(forward, torch.randn(2, K, 4, 16), dynamic=dynamic)
    assert few.ops["fq"] == 1
    assert_same(few)
    many = run_passes(forward, torch.randn(3, K, 43, 1), dynamic=dynamic)
    assert many.ops["fq"] == 0
    (kept,) = many.state.kept
    assert CONVOLUTION in kept.reason and "128 pixels at most" in kept.reason


def own_matmul(x: Tensor) -> Tensor:
    return x @ x.mT


NEAR_MISSES: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "no constant side": (own_matmul, X3),
    "x constant, weight not": (
        lambda x: NK @ x.expand(K, K).softmax(0) if x.dim() > 2 else F.linear(NK, x),
        X2,
    ),
    "both constant": (lambda x: NK @ KN + x[:, :1].mean(), X2),
    "integer": (lambda x: x.long() @ NK.t().long(), X2),
    "batch from the weight": (lambda x: x[:1] @ KN.expand(4, K, N), X3),
    "batch from [1, K, N]": (lambda x: x @ KN.unsqueeze(0), X2),
    "four-dimensional weight": (lambda x: x @ torch.stack([SQUARE, SQUARE]).view(2, 1, K, K), X3),
    "einsum with a repeated index": (
        lambda x: torch.einsum("bdd,nd->bn", own_matmul(x), SQUARE[:, :3]),
        X3,
    ),
    "einsum of a diagonal, implicit": (lambda x: torch.einsum("ii,jk", own_matmul(x), KN), X2),
    "tensordot of nothing": (lambda x: torch.tensordot(x[0], NK, dims=0), X2),
    "inner of numbers": (lambda x: torch.inner(x[0, 0], NK), X2),
    "three outer products": (lambda x: torch.einsum("a,nk,b->anb", x[:, 0], NK, x[0]), X2),
    "conv1d of several": (lambda x: F.conv1d(x[:, :32].mT[None], KN.view(N, 32, 2)), X2),
    "conv1d in groups": (lambda x: F.conv1d(x.mT, SQUARE[:, :32, None], groups=2), X3),
    "conv1d with steps": (lambda x: F.conv1d(x.mT, NK[..., None], stride=2), X3),
    "conv1d with padding": (lambda x: F.conv1d(x.mT, NK[..., None], padding=1), X3),
    "transposed conv1d": (lambda x: F.conv_transpose1d(x.mT, KN[..., None]), X3),
    "einsum that sums x": (lambda x: torch.einsum("bsd,nd->bn", x, NK), X3),
    "einsum that sums the weight": (lambda x: torch.einsum("bsd,nd->bs", x, NK), X3),
    "einsum that broadcasts K": (lambda x: torch.einsum("bk,nk->bn", x[:, :1], NK), X2),
    "outer product": (lambda x: torch.einsum("b,nd->bnd", x[:, 0], NK), X2),
    "weight that the graph writes": (lambda x: x @ KN.clone().add_(0.5).mul_(x[0, 0]), X2),
    "weight that depends on x": (lambda x: F.linear(x, NK * x[0, 0]), X2),
    "written into a buffer": (lambda x: torch.matmul(x, KN, out=torch.empty(6, N)), X2),
}


@pytest.mark.parametrize(("forward", "x"), NEAR_MISSES.values(), ids=list(NEAR_MISSES))
def test_near_miss_stays_as_it_is(forward: Callable[..., Tensor], x: Tensor) -> None:
    run = run_passes(forward, x)
    assert run.counts["match"] == 0, run.state.sites
    assert run.ops["fq"] == 0
    assert_same(run)


@pytest.mark.parametrize("w", [NK.double(), NK], ids=["weight", "cast in the graph"])
def test_float64_is_kept_with_its_reason(w: Tensor) -> None:
    run = run_passes(lambda x: F.linear(x.double(), w.to(torch.float64)), X2)
    assert run.counts["plan"] == 0
    assert run.ops["fq"] == 0
    reasons = [s.reason for s in run.state.sites] + [k.reason for k in run.state.kept]
    assert any("float64" in (reason or "") for reason in reasons), reasons


def test_site_knows_shape_bias_name_and_head() -> None:
    model = torch.nn.ModuleDict(
        {"lm_head": torch.nn.Linear(K, N), "up": torch.nn.Linear(K, N, bias=False)}
    )
    run = run_passes(lambda x: model["lm_head"](x) + model["up"](x), X2, until="match")
    head, up = run.state.sites
    assert (head.name, head.shape, head.head) == ("lm_head.weight", (N, K), True)
    assert (up.name, up.contraction.bias, up.head) == ("up.weight", None, False)
    assert head.contraction.bias is not None


def test_a_shared_expert_is_no_head() -> None:
    class Moe(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = torch.nn.ModuleDict({"up": torch.nn.Linear(K, N)})

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.shared["up"](x)
            return y

    (site,) = run_passes(Moe(), X2, until="match").state.sites
    assert (site.name, site.head) == ("shared.up.weight", False)


@pytest.mark.parametrize(
    "read",
    [
        lambda i, table: F.embedding(i, table),
        lambda i, table: table[i],
        lambda i, table: table[i, :],
        lambda i, table: table.index_select(0, i),
        lambda i, table: torch.gather(table, 0, i[:, None].expand(-1, K)),
        lambda i, table: F.embedding(i, table.detach().view(90, K)),
    ],
)
def test_weight_whose_rows_are_read_is_a_head(read: Any) -> None:
    table = torch.nn.Parameter(weight(90, K))
    run = run_passes(lambda i: F.linear(read(i, table), table), torch.tensor([1, 2]))
    assert [(site.head, bool(site.tables)) for site in run.state.sites] == [(True, True)]
    assert [kept.reason for kept in run.state.kept] == [TABLE]
    plan = run.state.sites[0].plan
    assert plan is not None and plan.bits == 8
    w_hat = quantize_weight(table.detach(), plan).dequantize(torch.float32)
    # the rows that are read stay as they were
    torch.testing.assert_close(run.outputs()[0], F.linear(table.detach()[[1, 2]], w_hat))


@pytest.mark.parametrize("read", [lambda w: w[:45], lambda w: w[3], lambda w: w.chunk(2)[0]])
def test_weight_whose_parts_are_read_is_no_head(read: Any) -> None:
    w = torch.nn.Parameter(weight(90, K))
    run = run_passes(lambda x: (F.linear(x, w), read(w) + 1), X2, until="match")
    assert [(site.head, bool(site.tables)) for site in run.state.sites] == [(False, False)]


def test_slices_of_one_parameter_are_numbered_sites() -> None:
    in_proj = torch.nn.Parameter(weight(3 * K, K))

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        q, k, _ = in_proj.chunk(3)
        return F.linear(x, q), F.linear(x, k), F.linear(x.relu(), q)

    run = run_passes(forward, X2)
    assert [s.name for s in run.state.sites] == ["in_proj[0]", "in_proj[1]", "in_proj[0]"]
    assert_same(run)


SPELLINGS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "[N, K]": lambda x, w: (F.linear(x, w), x @ w.t(), torch.einsum("bd,nd->bn", x, w)),
    "[K, N]": lambda x, w: (x @ w, F.linear(x, w.mT), torch.einsum("bd,dn->bn", x, w)),
}


@pytest.mark.parametrize("products", SPELLINGS.values(), ids=list(SPELLINGS))
def test_one_matrix_in_several_spellings_is_one_weight(products: Callable[..., Any]) -> None:
    """So it is packed once, and has one value for fake_quantize_ to write."""
    shared = torch.nn.Parameter(weight(K, K))
    run = run_passes(lambda x: products(x, shared), X2)
    assert [s.name for s in run.state.sites] == ["shared"] * 3
    assert_same(run)


def test_joined_weights_are_named_after_all_of_them() -> None:
    q, k = weight(N, K), weight(N, K, 1)
    run = run_passes(lambda x: F.linear(x, torch.cat([q, k])), X2, until="match")
    assert [s.name for s in run.state.sites] == ["q+k"]


def test_other_matrices_are_listed_with_what_reads_them() -> None:
    table, stack = weight(90, K), torch.stack([NK, NK])

    def forward(i: Tensor) -> Tensor:
        return torch.cdist(F.embedding(i, table).expand(2, -1, -1), stack)

    run = run_passes(forward, torch.tensor([1, 2]), until="match")
    reasons = {kept.name: (kept.kind, kept.reason) for kept in run.state.kept}
    assert reasons["table"] == ("linear", TABLE)
    assert reasons["stack"] == (
        "other",
        "read by cdist: not a linear or expert form that is quantized",
    )


def test_site_whose_x_is_a_parameter_is_quantized() -> None:
    """Learned queries: the weight is still multiplied on every call."""
    latents = torch.nn.Parameter(weight(5, K))
    run = run_passes(lambda x: F.linear(latents, NK) + x[:5, :N], X2)
    assert run.counts["rewrite"] == 1
    assert_same(run)


def test_symbolic_sizes_match() -> None:
    def forward(x: Tensor) -> Tensor:
        return torch.relu(x.view(-1, K) @ KN).view(*x.shape[:-1], N)

    run = run_passes(forward, X3, dynamic=True)
    assert run.ops["fq"] == 1
    assert run.ops["relu"] + run.ops["view"] == 0


def test_product_of_constants_that_is_a_weight_is_folded_into_one_site() -> None:
    a, b = weight(64, 64), weight(64, 64, 1)
    run = run_passes(lambda x: F.linear(x, F.linear(a, b)), torch.randn(4, 64), until="match")
    assert [site.name for site in run.state.sites] == ["a+b"]
    assert run.state.kept == []


def test_product_of_constants_that_is_also_an_activation_is_a_site() -> None:
    a, b = weight(64, 64), weight(64, 64, 1)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        ab = F.linear(a, b)
        return F.linear(x, ab), ab + 1

    run = run_passes(forward, torch.randn(4, 64), until="match")
    assert sorted(site.name for site in run.state.sites) == ["a+b", "b"]


def test_tensors_of_other_shapes_are_listed_with_what_reads_them() -> None:
    """A convolution's weight, a table, a weight per head that broadcasts: none is experts."""
    signal, image = weight(48, 64).view(16, 16, 12), weight(48, 64).view(16, 16, 4, 3)
    table, heads = weight(48, 64).view(3, 16, 64), weight(48, 64).view(1, 3, 16, 64)

    def forward(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        return (
            F.conv1d(x.view(1, 16, -1), signal.to(torch.float32)),
            F.conv2d(x.view(1, 16, -1, 8), image),
            table[i].sum(0) + x[0, 0],
            x.view(2, 1, -1, 16) @ heads,
        )

    run = run_passes(forward, torch.randn(16, 128), torch.tensor([1]), until="match")
    assert {kept.name: (kept.kind, kept.reason) for kept in run.state.kept} == {
        "signal": ("other", f"read by conv1d: {CONVOLUTION}"),
        "image": ("other", f"read by conv2d: {CONVOLUTION}"),
        "table": ("other", "read by sum: not a linear or expert form that is quantized"),
        "heads": ("other", "read by matmul: not a linear or expert form that is quantized"),
    }


@pytest.mark.parametrize(
    ("equation", "shape", "kind"),
    [
        ("bind,snd->bnis", (2, 4, 16), "other"),  # a table for each head, as in Funnel
        ("bind,nsd->bnis", (4, 2, 16), "experts"),
        ("bind,nds->bnis", (4, 16, 2), "experts"),
        ("bind,dsn->bnis", (16, 2, 4), "other"),
        ("bind,nds->bins", (4, 16, 2), "experts"),
        ("bind,mnd->bim", (8, 4, 16), "linear"),  # heads that are summed over
    ],
)
def test_stack_whose_matrices_an_inner_dimension_numbers_is_none_of_experts(
    equation: str, shape: tuple[int, ...], kind: str
) -> None:
    stack = weight(shape[0], shape[1] * shape[2]).view(shape)
    run = run_passes(lambda x: torch.einsum(equation, x, stack), torch.randn(3, 5, 4, 16))
    assert [site.kind for site in run.state.sites] == [kind]
    assert_same(run)

"""rewrite: one op per quantized site, arguments in the schema's order, and no matmul left over."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fqcompile.passes.op_nodes import argument
from tests.passes.graphs import assert_same, run_passes, weight

NK, KN = weight(48, 64), weight(64, 48)
BIAS = torch.randn(48)
X = torch.randn(6, 64)
MATMULS = {"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "mv"}


def test_op_carries_format_shape_and_bias() -> None:
    run = run_passes(lambda x: F.linear(x, NK, BIAS), X, until="rewrite", bits=8)
    (op,) = run.linears
    names = ("bits", "group_size", "n", "k", "activation", "gated", "kernel")
    assert [argument(op, name) for name in names] == [8, 32, 48, 64, "none", False, ""]
    assert argument(op, "x").name.endswith("x_")
    assert "bias" in argument(op, "bias").name
    assert argument(op, "residual") is None
    assert op.meta["example_value"].shape == (6, 48)
    assert_same(run)


def test_every_site_has_its_own_inputs_behind_all_others() -> None:
    run = run_passes(lambda x: F.linear(x, NK) + x @ KN, X, until="rewrite")
    names = [n.name for n in run.state.graph.nodes if n.op == "placeholder"]
    assert names[-4:] == ["fq_0_qweight", "fq_0_scale", "fq_1_qweight", "fq_1_scale"]
    assert not MATMULS & set(run.ops)
    assert [site.op for site in run.state.sites] == run.linears


def test_folded_weight_expressions_leave_the_graph() -> None:
    run = run_passes(
        lambda x: F.linear(x, torch.cat([NK, KN.t()]).to(torch.float32)), X, until="rewrite"
    )
    assert run.ops == {"fq": 1}
    assert_same(run)


def test_folded_expression_with_another_reader_stays() -> None:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        w = torch.cat([NK, KN.t()])
        return F.linear(x, w), w.sum()

    run = run_passes(forward, X, until="rewrite")
    assert (run.ops["cat"], run.ops["sum"]) == (1, 1)


def test_chain_of_sites_reads_the_new_nodes() -> None:
    """A site's x, and its bias, may be the result of a site rewritten before it."""
    square = weight(64, 64, 3)

    def forward(x: Tensor) -> Tensor:
        y = F.linear(x, square)
        return torch.addmm(F.linear(y, NK), y, KN)

    run = run_passes(forward, X, until="rewrite")
    assert not MATMULS & set(run.ops)
    assert_same(run)


def test_kept_site_keeps_its_matmul() -> None:
    a, b = weight(64, 64), weight(64, 64, 1)
    run = run_passes(lambda x: F.linear(F.linear(x, a), b), X, until="rewrite", exclude=["^a$"])
    assert run.ops == {"linear": 1, "fq": 1}
    assert_same(run)


def test_bias_that_is_no_row_is_added_behind() -> None:
    full = torch.randn(6, 48)
    run = run_passes(lambda x: torch.addmm(full, x, KN), X, until="rewrite")
    assert run.ops == {"fq": 1, "add": 1}
    assert_same(run)


def test_addmm_under_autocast_keeps_its_dtype() -> None:
    """autocast casts the bias of addmm; the add which stands in for it needs a cast of its own."""

    def forward(x: Tensor, full: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.addmm(full, x, KN)

    run = run_passes(forward, X, torch.randn(6, 48), until="rewrite")
    (got,), (want,) = run.outputs(), run.expected()
    assert got.dtype == want.dtype == torch.bfloat16
    # Rounded to 2^-8 of itself a few times on both sides: x, ŵ, the bias, the sum.
    assert float((got - want).abs().max()) <= 6 * 2**-8 * float(want.abs().max())


def test_left_matmul_is_transposed_around_the_op() -> None:
    run = run_passes(lambda x: (NK @ x.mT).view(-1), X, until="rewrite")
    ops = run.ops
    assert ops.pop("getattr", 0) + ops.pop("mT", 0) == 1  # x.mT, as this release captures it
    assert ops == {"fq": 1, "permute": 2, "contiguous": 1, "view": 1}
    assert_same(run)


def test_result_of_einsum_has_the_layout_that_views_of_it_rely_on() -> None:
    """Of a weight that comes first, einsum leaves the free indices outermost in memory."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.einsum("hkd,bsd->hbsk", NK.view(4, 12, 64), x)
        return y, y.permute(0, 3, 1, 2).view(-1)

    run = run_passes(forward, torch.randn(2, 3, 64), until="rewrite")
    assert not MATMULS & set(run.ops)
    assert_same(run)


def test_two_einsums_of_the_same_rows_share_their_arrangement() -> None:
    other = weight(48, 64, 1)

    def forward(x: Tensor) -> Tensor:
        first = torch.einsum("bhsd,hdn->bsn", x, KN.view(4, 16, 48))
        return first + torch.einsum("bhsd,hdn->bsn", x, other.t().view(4, 16, 48))

    run = run_passes(forward, torch.randn(2, 4, 3, 16), until="rewrite")
    assert (run.ops["fq"], run.ops["permute"], run.ops["flatten"]) == (2, 1, 1)
    assert_same(run)

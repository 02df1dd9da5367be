"""PackedWeight: what it answers itself equals the same on the dequantized weight, bit for bit."""

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from safetensors.torch import save
from torch import Tensor, nn

import fqcompile
from fqcompile.errors import FineQuantError, UnquantizableWeight
from fqcompile.kernels.registry import TEMPLATES
from fqcompile.quant.choose import QuantPlan, quantize_weight
from fqcompile.tensor.format import Format
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.weights.parameter import PackedWeight
from tests.helpers import UNIT

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(
    *shape: int,
    bits: int = 4,
    levels: str = "uniform",
    group: int = 32,
    transposed: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PackedWeight:
    """Of a random matrix [N, K] or stack [E, N, K]; transposed, it is shown as [..., K, N]."""
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    plan = QuantPlan(bits, min(group, shape[-1]), "mse", torch.float16, 0.0, levels=levels)
    weight = quantize_weight(w, plan)
    return PackedWeight.of(weight.changed(transposed=transposed), dtype)


def dense(w: Tensor) -> Tensor:
    """The oracle: from the plain codes, by nothing that the tensor does itself."""
    assert isinstance(w, PackedWeight)
    weight, form = w.quantized(), w.format
    codes, scale = weight.as_rows()
    if weight.bits == 4:
        low, high = (codes & 15).to(torch.int16) - 8, (codes >> 4).to(torch.int16) - 8
        codes = torch.stack((low, high), -1).flatten(1)[:, : form.k]
    columns = torch.arange(form.k) // weight.group_size
    matrix = (codes.float() * scale.float()[:, columns]).to(w.dtype)
    stack = matrix.view(form.experts, form.rows, form.k) if form.experts else matrix
    stack = stack if w.ids is None else stack[w.ids]
    return stack.transpose(-2, -1) if form.transposed else stack


VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "t": lambda w: w.t(),
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(0, 1),
    "permute": lambda w: w.permute(1, 0),
    "detach": lambda w: w.detach(),
    "view": lambda w: w.view(w.shape),
    "clone": lambda w: w.clone(),
    "rows": lambda w: w[64:128],
    "odd rows": lambda w: w[3:17],
    "narrow": lambda w: w.narrow(0, 10, 50),
    "columns of w.t()": lambda w: w.t()[:, 5:70],
    "half": lambda w: w.to(torch.float16),
    "same": lambda w: w.to(torch.float32),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("bits", [4, 8])
def test_views_stay_packed_and_are_right(name: str, bits: int) -> None:
    w = make(192, 80, bits=bits)
    found, expected = VIEWS[name](w), VIEWS[name](dense(w))
    assert isinstance(found, PackedWeight)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(dense(found), expected)
    assert torch.equal(found.dequantized(), expected)


def test_parts_and_wholes() -> None:
    w, v = make(192, 80), make(64, 80, group=16, seed=1)
    for parts in (w.chunk(3), w.split(70), w.split([100, 92]), w.t().chunk(2, 1)):
        assert all(isinstance(part, PackedWeight) for part in parts)
    halves = torch.cat([dense(part) for part in w.chunk(3)])
    assert torch.equal(halves, dense(w))
    both = torch.cat([w, v])
    assert isinstance(both, PackedWeight) and both.format.group_size == 16
    assert torch.equal(dense(both), torch.cat([dense(w), dense(v)]))


def test_experts_are_taken_from_a_stack_without_a_copy() -> None:
    w = make(5, 64, 48, transposed=True)
    assert w.shape == (5, 48, 64)
    for one in (w[2], w.select(0, 2), w.unbind()[2]):
        assert isinstance(one, PackedWeight)
        assert torch.equal(dense(one), dense(w)[2])
        assert one.qweight.data_ptr() == w.qweight[2].data_ptr()
    ids = torch.tensor([4, 0, 4])
    for some in (w[ids], w.index_select(0, ids)):
        assert isinstance(some, PackedWeight) and some.qweight is w.qweight
        assert torch.equal(dense(some), dense(w)[ids])
    x = torch.randn(1, 3, 48)
    assert torch.equal(x @ w[[-1]], x @ w[[4]])
    with pytest.raises(IndexError):  # as of a dense stack
        x @ w.index_select(0, torch.tensor([-1]))


Product = Callable[[Tensor, Tensor], Tensor]
MATRIX: dict[str, tuple[bool, Product]] = {
    "linear": (False, lambda x, w: F.linear(x, w)),
    "linear of three dimensions": (False, lambda x, w: F.linear(x[None], w)),
    "biased": (False, lambda x, w: F.linear(x, w, torch.arange(w.shape[0], dtype=x.dtype))),
    "mm": (True, lambda x, w: x @ w),
    "mm of w.t()": (False, lambda x, w: x @ w.t()),
    "addmm": (True, lambda x, w: torch.addmm(torch.ones(w.shape[1], dtype=x.dtype), x, w)),
    "addmm of a matrix": (True, lambda x, w: torch.addmm(x[:, :1], x, w)),
    "scaled addmm": (True, lambda x, w: torch.addmm(x[:, :1], x, w, beta=0.5, alpha=2)),
    "left": (False, lambda x, w: (w @ x.t()).t()),
    "vector": (False, lambda x, w: torch.mv(w, x[0])),
    "einsum": (False, lambda x, w: torch.einsum("mk,nk->mn", x, w)),
    "einsum, implicit": (True, lambda x, w: torch.einsum("ij,jk", x, w)),
    "einsum of lists": (False, lambda x, w: torch.einsum(x, [0, 1], w, [2, 1], [0, 2])),
    "einsum of three": (False, lambda x, w: torch.einsum("mk,nk,mk->mn", x, w, x)),
    "tensordot": (True, lambda x, w: torch.tensordot(x, w, dims=1)),
    "inner": (False, lambda x, w: torch.inner(x, w)),
    "linalg.matmul": (True, lambda x, w: torch.linalg.matmul(x, w)),
    "data": (False, lambda x, w: F.linear(x, w.data)),
    "sum": (False, lambda x, w: x.sum() + w.sum(0)),
}


def assert_near(found: Tensor, expected: Tensor, k: int) -> None:
    """Sums of K products in fp32 in any order, each result rounded to its type twice at most."""
    assert found.shape == expected.shape
    if not found.numel():
        return
    unit = UNIT[found.dtype]
    allowed = (2 * unit + k * UNIT[torch.float32]) * float(expected.abs().max() + 1)
    assert float((found.double() - expected.double()).abs().max()) <= 4 * allowed


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("name", MATRIX)
@given(
    m=st.integers(0, 20),
    n=st.integers(1, 80),
    k=st.integers(1, 80),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_products_with_a_matrix(
    name: str, inference: bool, m: int, n: int, k: int, bits: int, dtype: torch.dtype, seed: int
) -> None:
    transposed, product = MATRIX[name]
    w = make(n, k, bits=bits, dtype=dtype, transposed=transposed, seed=seed)
    m = max(m, 1) if name == "vector" else m
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.inference_mode(inference):
        found = product(x, w)
    assert found.dtype == dtype and type(found) is Tensor
    expected = product(x.double(), dense(w).double())
    assert_near(found, expected, k)


def _offsets(rows: int, experts: int, seed: int) -> Tensor:
    ends = torch.randint(0, rows + 1, (experts,), generator=torch.Generator().manual_seed(seed))
    return ends.sort().values.to(torch.int32)


@given(
    rows=st.integers(1, 20),
    experts=st.integers(1, 5),
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    transposed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_products_with_experts(
    rows: int, experts: int, n: int, k: int, transposed: bool, dtype: torch.dtype, seed: int
) -> None:
    w = make(experts, n, k, dtype=dtype, transposed=transposed, seed=seed)
    stack = w if transposed else w.mT  # [E, K, N]
    exact = dense(stack).double()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator).to(dtype)
    ids = torch.randint(0, experts, (rows,), generator=generator)
    expected = torch.einsum("pk,pkn->pn", x.double(), exact[ids])
    right = torch.bmm(x.unsqueeze(1), stack[ids]).squeeze(1)
    left = torch.bmm(stack.mT[ids], x.unsqueeze(2)).squeeze(2)
    bias = torch.ones(rows, 1, n, dtype=dtype)
    biased = torch.baddbmm(bias, x.unsqueeze(1), stack[ids]).squeeze(1)
    assert_near(right, expected, k)
    assert_near(left, expected, k)
    assert_near(biased, expected + 1, k)
    many = torch.randn(experts, rows, k, generator=generator).to(dtype)
    assert_near(torch.bmm(many, stack), many.double() @ exact, k)
    assert_near(torch.bmm(stack.mT, many.mT), (many.double() @ exact).mT, k)
    offsets = _offsets(rows, experts, seed)
    grouped = torch.ops.aten._grouped_mm.default(x, stack, offsets)
    of_row = torch.searchsorted(offsets, torch.arange(rows, dtype=torch.int32), right=True)
    routed = of_row < experts
    sums = torch.einsum("pk,pkn->pn", x[routed].double(), exact[of_row[routed]])
    assert_near(grouped[routed], sums, k)


def test_x_of_another_type_is_refused_as_a_dense_weight_would() -> None:
    with pytest.raises(RuntimeError, match=r"same dtype.*bfloat16.*float32"):
        F.linear(torch.ones(1, 80, dtype=torch.bfloat16), make(64, 80))
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(torch.ones(1, 80), make(64, 80)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(96, 64), (3, 96, 64)])
def test_gradients_of_x_flow_and_the_weight_has_none(shape: tuple[int, ...]) -> None:
    w = make(*shape)
    parameter = nn.Parameter(w, requires_grad=False)
    x = torch.randn(*shape[:-2], 5, 64, requires_grad=True)
    exact = x.detach().clone().requires_grad_()
    (x @ parameter.mT).square().sum().backward()
    (exact @ dense(w).mT).square().sum().backward()
    assert x.grad is not None and exact.grad is not None and parameter.grad is None
    torch.testing.assert_close(x.grad, exact.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("write", ["add_", "mul_", "zero_", "fill_", "normal_"])
def test_writes_in_place_are_refused(write: str) -> None:
    w = make(64, 80)
    before = dense(w)
    arguments = {"add_": (1,), "mul_": (2,), "fill_": (0.0,)}.get(write, ())
    with pytest.raises(FineQuantError, match=r"packed weight \(64, 80\).*copy_.*restore"):
        getattr(w, write)(*arguments)
    assert torch.equal(dense(w), before)


@pytest.mark.parametrize("way", ["copy_", "data"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("levels", ["uniform", "normal"])
def test_values_copied_in_are_quantized_as_the_old_were(
    way: str, transposed: bool, levels: str
) -> None:
    made = make(64, 80, levels=levels, transposed=transposed, seed=5)
    w = torch.nn.Parameter(made, requires_grad=False)
    assert isinstance(w, PackedWeight)
    new = torch.randn(64, 80)
    values = new.t() if transposed else new
    version, codes = w._version, w.qweight
    if way == "copy_":
        w.copy_(values)
    else:
        w.data = values
    expected = quantize_weight(new, QuantPlan(4, 32, "mse", torch.float16, 0.0, levels=levels))
    assert torch.equal(w.quantized().qweight, expected.qweight)
    assert torch.equal(w.quantized().scale, expected.scale)
    assert w.qweight is codes, "in the same memory, which compiled graphs hold"
    assert w._version > version


def test_codes_are_copied_as_they_are_whatever_their_format() -> None:
    w = make(64, 80)
    others = {"seed": 1}, {"levels": "normal"}, {"bits": 8, "group": 80}
    for other in (make(64, 80, **how) for how in others):  # type: ignore[arg-type]
        w.copy_(other)
        assert torch.equal(dense(w), dense(other))
        assert w.qweight.data_ptr() != other.qweight.data_ptr()


def test_values_that_cannot_be_quantized_leave_the_old_ones() -> None:
    w = make(64, 80)
    before = dense(w)
    with pytest.raises(UnquantizableWeight, match="NaN"):
        w.copy_(torch.full((64, 80), torch.nan))
    with pytest.raises(FineQuantError, match=r"\(64, 80\) got values of shape \(80, 64\)"):
        w.copy_(torch.ones(80, 64))
    assert torch.equal(dense(w), before)


def _module(w: PackedWeight) -> nn.Linear:
    layer = nn.Linear(80, 64).requires_grad_(False)
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer


def _through_file(value: Any, *, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def _assigned(layer: nn.Module) -> nn.Module:
    fresh = nn.Linear(80, 64).requires_grad_(False)
    fresh.load_state_dict(_through_file(layer.state_dict(), weights_only=True), assign=True)
    return fresh


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": lambda layer: _through_file(layer, weights_only=False),
    "state_dict": _assigned,
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_are_packed_equal_and_apart(way: str) -> None:
    layer = _module(make(64, 80))
    copied = COPIES[way](layer)
    assert isinstance(copied.weight, PackedWeight) and isinstance(copied.weight, nn.Parameter)
    assert not copied.weight.requires_grad
    before = dense(copied.weight)
    assert torch.equal(before, dense(layer.weight))
    x = torch.randn(3, 80)
    assert torch.equal(copied(x), layer(x))
    layer.weight.copy_(torch.zeros(64, 80))
    assert torch.equal(dense(copied.weight), before)


def test_load_state_dict_takes_dense_and_packed_values() -> None:
    layer, dense_one = _module(make(64, 80)), nn.Linear(80, 64)
    layer.load_state_dict(dense_one.state_dict())
    error = (dense(layer.weight) - dense_one.weight).norm() / dense_one.weight.norm()
    assert 0.01 < error < 0.15
    other = _module(make(64, 80, seed=3))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(dense(layer.weight), dense(other.weight))


def test_files_are_in_the_plain_layout() -> None:
    """So that a machine with other kernels reads them."""
    w = make(64, 80)
    file = io.BytesIO()
    torch.save(w, file)
    file.seek(0)
    with patch.dict(TEMPLATES):  # restores their order, too, which selection goes by
        for name in ("x86_stream", "triton_gemm", "triton_gemm_kw4"):
            TEMPLATES.pop(name, None)
        loaded = torch.load(file)
    assert loaded.format.layout == "plain"
    assert torch.equal(dense(loaded), dense(w))


def test_what_would_write_garbage_is_refused() -> None:
    layer = _module(make(64, 80))
    with pytest.raises(FineQuantError, match=r"fqcompile\.save"):
        save({"w": layer.weight})
    for read in (Tensor.__array__, torch.from_dlpack, PackedWeight.numpy):
        with pytest.raises(FineQuantError, match=r"fqcompile\.restore"):
            read(layer.weight)


def test_moving_and_casting_a_module() -> None:
    layer = _module(make(64, 80))
    x, before = torch.randn(3, 80), dense(layer.weight)
    y = layer(x)
    assert layer.to("cpu") is layer and torch.equal(layer(x), y)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16 and half.weight.quantized().bits == 4
    assert torch.equal(dense(half.weight), before.to(torch.bfloat16))
    assert torch.equal(dense(half.float().weight), before), "codes and scales were not touched"
    assert copy.deepcopy(layer).to("meta").weight.device.type == "meta"
    layer.share_memory()
    assert layer.weight.is_shared() and torch.equal(layer(x), y)


def test_another_process_shares_the_memory() -> None:
    layer = _module(make(64, 80))
    sent = ForkingPickler.loads(bytes(ForkingPickler.dumps(layer.weight)))
    assert isinstance(sent, nn.Parameter) and torch.equal(dense(sent), dense(layer.weight))
    layer.weight.qweight.zero_()
    assert torch.equal(sent.qweight, layer.weight.qweight)


def _put(layer: nn.Module, x: Tensor, results: Any) -> None:
    with torch.no_grad():
        results.put(layer(x).tolist())


@pytest.mark.slow
@pytest.mark.parametrize("share", [False, True])
def test_a_spawned_process_is_given_a_packed_module(share: bool) -> None:
    layer, x = _module(make(64, 80)), torch.randn(3, 80)
    layer = layer.share_memory() if share else layer
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_put, args=(layer, x, results))
    process.start()
    with torch.no_grad():
        assert results.get(timeout=120) == layer(x).tolist()
    process.join()


def test_nothing_is_copied_to_make_a_parameter_of_it() -> None:
    w = make(64, 80)
    parameter = nn.Parameter(w, requires_grad=False)
    assert isinstance(parameter, PackedWeight) and parameter.qweight is w.qweight
    assert "int4" in repr(parameter) and "groups of 32" in repr(parameter)


def test_scales_of_another_type_than_the_weight_survive() -> None:
    weight = QuantizedTensor(
        torch.zeros(64, 40, dtype=torch.uint8), torch.full((64, 1), 1e-30), Format(4, 80, 64, 80)
    )
    w = PackedWeight.of(weight, dtype=torch.bfloat16)
    assert w.scale.dtype == torch.float32
    assert torch.equal(pickle.loads(pickle.dumps(w)).quantized().scale, weight.scale)


def test_a_linears_weight_read_as_a_table_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"up": nn.Linear(256, 192), "tied": nn.Linear(256, 192)})
    fqcompile.quantize_(model, bits=4, min_elements=0)
    ids = torch.tensor([3, 5])
    w = model["tied"].weight
    for _ in range(2):
        for read in (F.embedding(ids, w), w[ids], w.index_select(0, ids)):
            assert torch.equal(read, w.dequantize()[ids])
    said = [r.getMessage() for r in caplog.records if "as a table" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("tied.weight is packed to 4 bits")
    assert "exclude=['tied.weight']" in said[0] and "overrides" in said[0]


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="Dynamo of PyTorch 2.11 takes no tensor of another class in a branch of torch.cond",
)
@pytest.mark.parametrize("chosen", [False, True])
def test_a_branch_of_cond_runs_in_eager_calls(chosen: bool) -> None:
    torch.compiler.reset()
    layer = nn.Linear(64, 32)
    fqcompile.quantize_(layer, min_elements=0)
    x, w = torch.randn(3, 64), layer.weight.dequantize()
    with torch.no_grad():
        got = torch.cond(torch.tensor(chosen), layer, lambda x: 2 * layer(x), (x,))
        want = F.linear(x, w, layer.bias) * (1 if chosen else 2)
    # Two ways to sum 64 products, and the factor: of terms below |x| @ |w|.
    bound = 2 * 2 * 65 * UNIT[torch.float32] * (F.linear(x.abs(), w.abs()) + layer.bias.abs())
    assert bool(((got - want).abs() <= bound).all())

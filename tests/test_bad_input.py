"""Bad options raise and name the remedy; a bad weight is kept with its reason, or raises."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

import fqcompile
from fqcompile.backend import finequant as backend
from tests.helpers import assert_close, finequant, quantized_names, report

N, K = 128, 256


class Weighted(nn.Module):
    """One matmul, written as the test needs it, with one buffer."""

    def __init__(self, weight: Tensor, call: Callable[[Tensor, Tensor], Tensor] = F.linear) -> None:
        super().__init__()
        self.register_buffer("w", weight)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.w)


def _weight() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0))


def _x() -> Tensor:
    return torch.randn(3, K, generator=torch.Generator().manual_seed(1))


OPTIONS = [
    ({"bit": 4}, "unknown option bit; allowed: bits, .*; did you mean 'bits'?"),
    ({"bits": "4"}, "option bits is '4' (str); allowed: 4, 8"),
    ({"bits": 3}, "option bits is 3 (int); allowed: 4, 8"),
    ({"alpha": 1.0}, "option alpha is 1.0 (float); allowed: a number with 0 < alpha < 1"),
    ({"alpha": 0}, "option alpha is 0 (int); allowed: a number with 0 < alpha < 1"),
    ({"granularity": 0}, "option granularity is 0 (int); allowed: 'adaptive', 'range', 'column'"),
    ({"include": ["("]}, "option include[0] is '(', which is not a regular expression: missing )"),
    ({"overrides": {"*": {}}}, "option overrides (a key) is '*', which is not a regular"),
    ({"exclude": ["*mlp"]}, "nothing to repeat at position 0; for any beginning write '.*mlp'"),
    ({"inner_backend": "finequant"}, "a torch.compile backend other than 'finequant'"),
]


@pytest.mark.parametrize(("options", "text"), OPTIONS, ids=[str(o) for o, _ in OPTIONS])
def test_a_bad_option_raises_at_compile_time(options: dict[str, Any], text: str) -> None:
    model = Weighted(_weight())
    with pytest.raises(Exception) as raised:
        torch.compile(model, backend="finequant", options=options)(_x())
    assert isinstance(raised.value, BackendCompilerFailed)
    assert isinstance(raised.value.inner_exception, fqcompile.OptionError)
    before, _, after = text.partition(".*")
    assert before in str(raised.value)
    assert after in str(raised.value)
    with pytest.raises(fqcompile.OptionError):
        fqcompile.explain(model, _x(), **options)


def test_an_unknown_inner_backend_raises_and_lists_those_there_are() -> None:
    with pytest.raises(Exception, match="inductr"):
        finequant(Weighted(_weight()), inner_backend="inductr")(_x())


def _with(value: float) -> Tensor:
    weight = _weight()
    weight[1, 2] = weight[5, 7] = value
    return weight


def _cast(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w.to(x.dtype))


KEPT: dict[str, tuple[Callable[[], nn.Module], torch.dtype, str]] = {
    "nan": (
        lambda: Weighted(_with(torch.nan)),
        torch.float32,
        "2 of 32768 values are NaN or infinite; the first is nan at (1, 2)",
    ),
    "inf": (
        lambda: Weighted(_with(-torch.inf)),
        torch.float32,
        "2 of 32768 values are NaN or infinite; the first is -inf at (1, 2)",
    ),
    "float64": (
        lambda: Weighted(_weight().double()),
        torch.float64,
        "dtype torch.float64 is not supported; use fp32, fp16 or bf16",
    ),
    "float8": (
        lambda: Weighted(_weight().to(torch.float8_e4m3fn), _cast),
        torch.float32,
        "dtype torch.float8_e4m3fn is not supported; use fp32, fp16 or bf16",
    ),
    "int8": (
        lambda: Weighted(_weight().mul(10).to(torch.int8), _cast),
        torch.bfloat16,
        "dtype torch.int8 is not supported; use fp32, fp16 or bf16",
    ),
    "empty": (
        lambda: Weighted(torch.empty(0, K)),
        torch.float32,
        "shape is (0, 256): there is nothing to quantize",
    ),
    "subclass": (
        lambda: Weighted(TwoTensor(_weight(), _weight())),
        torch.float32,
        "the weight is a TwoTensor, not a plain tensor",
    ),
    "computed": (
        lambda: Weighted(_weight(), lambda x, w: F.linear(x, torch.sign(w))),
        torch.float32,
        "read by sign: not a linear or expert form that is quantized",
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_bad_weight_is_kept_with_its_reason(case: str) -> None:
    make, dtype, reason = KEPT[case]
    model, x = make(), _x().to(dtype)
    actual, expected = finequant(model, min_elements=0)(x), model(x)
    assert torch.equal(actual.nan_to_num(0), expected.nan_to_num(0))
    assert torch.equal(actual.isnan(), expected.isnan())
    (site,) = report().sites
    assert (site.name, site.status, site.reason) == ("w", "kept", reason)
    assert fqcompile.explain(model, x, min_elements=0).site("w").reason == reason


@pytest.mark.parametrize("case", ["nan", "inf", "float64", "float8", "int8", "subclass"])
def test_a_bad_weight_raises_where_asked_to(case: str) -> None:
    make, dtype, reason = KEPT[case]
    with pytest.raises(BackendCompilerFailed) as raised:
        finequant(make(), on_unsupported="error")(_x().to(dtype))
    assert isinstance(raised.value.inner_exception, fqcompile.UnquantizableWeight)
    remedy = "(on_unsupported='error'; exclude the parameter, or use on_unsupported='keep')"
    assert f"w: {reason} {remedy}" in str(raised.value)


def test_an_excluded_bad_weight_does_not_raise() -> None:
    model = Weighted(_with(torch.nan))
    finequant(model, on_unsupported="error", exclude=["w"])(_x())
    assert report().plan.site("w").reason == "name matches exclude pattern 'w'"


SITE_OPTIONS = [
    (
        {"granularity": 512},
        "granularity 512 is larger than K = 256; use a group size of at most 256, or "
        '"column" for one scale per column',
    ),
    ({"error_budget": 1e-9}, "error_budget 1e-09 cannot be met: the best relative error is 0.00"),
    ({"min_elements": 10**6}, "fewer elements than min_elements=1000000"),
    ({"include": ["other"]}, "name matches no include pattern"),
]


@pytest.mark.parametrize(("options", "reason"), SITE_OPTIONS)
def test_an_option_that_a_weight_cannot_meet(options: dict[str, Any], reason: str) -> None:
    model = Weighted(_weight())
    assert torch.equal(finequant(model, **options)(_x()), model(_x()))
    assert report().plan.site("w").reason.startswith(reason)


def test_a_weight_on_the_meta_device() -> None:
    model = Weighted(_weight().to("meta"))
    assert finequant(model)(_x().to("meta")).shape == (3, N)
    reason = "the weight is on device 'meta'; supported: cpu, cuda"
    assert report().plan.site("w").reason == reason


def _graph_of_one_linear(example: Tensor) -> fx.GraphModule:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    y = graph.call_function(F.linear, (x, w))
    graph.output((y,))
    x.meta["example_value"], w.meta["example_value"] = _x(), example
    y.meta["example_value"] = F.linear(_x(), example)
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.filterwarnings("ignore:.*(Sparse|quantize|deprecated).*")
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (Tensor.to_sparse_csr, "sparse_csr"),
        (Tensor.to_sparse, "sparse_coo"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "qint8"),
    ],
)
def test_a_sparse_or_quantized_weight(change: Callable[[Tensor], Tensor], kind: str) -> None:
    """Dynamo hands such inputs to Python, but another front end need not."""
    weight = nn.Parameter(change(_weight()), requires_grad=False)
    gm = _graph_of_one_linear(_weight())
    backend(gm, [_x(), weight], options={"inner_backend": "eager"})
    (site,) = report().sites
    assert site.reason == f"the weight is already quantized or sparse ({kind})"


@pytest.mark.filterwarnings("ignore:.*(Sparse|graph break).*")
def test_a_model_with_a_sparse_weight_still_runs() -> None:
    model = Weighted(_weight().to_sparse_csr())
    assert_close(finequant(model, fullgraph=False)(_x()), F.linear(_x(), _weight()), k=K)


NEAR_MISSES: dict[str, Callable[[Tensor], Tensor]] = {
    "weight passed in": lambda x: F.linear(x, x),
    "weight made from the input": lambda x: F.linear(x, torch.cat([x, x])),
    "two activations": lambda x: torch.bmm(x[None], x.mT[None])[0],
    "integers": lambda x: x.int() @ x.int().T,
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_what_only_looks_like_a_site_is_left_alone(case: str) -> None:
    function, x = NEAR_MISSES[case], torch.randn(K, K)
    assert torch.equal(finequant(function)(x), function(x))
    assert not report().sites


def test_a_weight_that_the_graph_writes_to_is_not_quantized() -> None:
    def call(x: Tensor, w: Tensor) -> Tensor:
        w.mul_(0.5)
        return F.linear(x, w)

    model, reference = Weighted(_weight(), call), Weighted(_weight(), call)
    compiled = finequant(model)
    for _ in range(3):
        assert torch.equal(compiled(_x()), reference(_x()))
    assert not quantized_names(report().sites)
    assert report().plan.site("w").reason


def test_explain_raises_as_compiling_would() -> None:
    model = Weighted(_with(torch.nan))
    with pytest.raises(fqcompile.UnquantizableWeight, match=r"w: 2 of 32768 values are NaN"):
        fqcompile.explain(model, _x(), on_unsupported="error")

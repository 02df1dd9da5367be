"""No operator hands a kernel what it would read past: every wrong argument is refused by its sizes.

Of each template the implementation is called, and the fake; wrong activations lie before a page
that nothing may touch, so that a rule which is missing ends the process.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fqcompile.errors import NoKernelError, OptionError
from fqcompile.kernels.op import dequantize, matmul, matmul_backward, matmul_inference
from fqcompile.kernels.registry import LAYOUTS, TEMPLATES
from fqcompile.kernels.template import Layout
from fqcompile.tensor.format import Format, num_groups
from fqcompile.tensor.quantized import QuantizedTensor
from tests.kernels.cpu.guarded import at_end_of_page
from tests.native.paths import NAMES, path
from tests.strategies import random_codes

N, K, M, EXPERTS = 64, 256, 3, 2
BF16 = torch.bfloat16
BITS = {"aten_int8pack": 8}  # of other templates 4
Change = dict[str, Any]


def plain(rows: int, k: int, bits: int, group: int, dtype: torch.dtype = BF16) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.ones(rows, num_groups(k, group), dtype=dtype)
    return QuantizedTensor(
        random_codes(bits, rows, k, generator), scale, Format(bits, group, rows, k)
    )


@pytest.fixture(autouse=True)
def _in_cpp() -> Iterator[None]:
    """The operator's implementation in C++, where there is one, is asked first."""
    with path(NAMES[0]) if NAMES else nullcontext():
        yield


# The operators, and the one by the ways in which its rows are told their experts.
LINEAR, GROUPED, GATHERED = "linear", "grouped", "gathered"
DEQUANTIZE, BACKWARD = "dequantize", "backward"
OPS = {
    LINEAR: matmul, GROUPED: matmul, GATHERED: matmul, "inference": matmul_inference,
    DEQUANTIZE: dequantize, BACKWARD: matmul_backward,
}  # fmt: skip


def arguments(call: str, template: str) -> dict[str, Any]:
    """Right ones, by the names of the schema."""
    bits = BITS.get(template, 4)
    group = K if bits == 8 else 64
    stack = EXPERTS if call in (GROUPED, GATHERED, BACKWARD) else 0
    weight = plain(max(1, stack) * N, K, bits, group)
    form = Format(bits, group, N, K, stack)
    weight = TEMPLATES[template].layout.pack(QuantizedTensor.of_rows(*weight.tensors, form))
    qweight, scale = weight.tensors
    rows = torch.tensor([1, 0, 1], dtype=torch.int32)
    ends = torch.tensor([1, 3], dtype=torch.int32)
    given = {
        "x": torch.ones(M, K, dtype=BF16), "dz": torch.ones(M, N, dtype=BF16),
        "qweight": qweight, "scale": scale, "bias": None, "residual": None,
        "offsets": ends if call in (GROUPED, BACKWARD) else None,
        "ids": rows if call == GATHERED else None,
        "bits": bits, "levels": "uniform", "group_size": group, "n": N, "rows": N, "k": K,
        "activation": "none", "gated": False, "dtype": BF16, "kernel": template, "zero_rest": False,
    }  # fmt: skip
    return {argument.name: given[argument.name] for argument in OPS[call]._schema.arguments}


def ones(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return at_end_of_page(torch.ones(shape, dtype=dtype))


def whole(*numbers: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return at_end_of_page(torch.tensor(numbers, dtype=dtype))


def short(given: dict[str, Any], name: str) -> Tensor:
    """Half of it."""
    t = given[name]
    dim = max(d for d in range(t.dim()) if t.shape[d] > 1)
    return at_end_of_page(t.narrow(dim, 0, t.shape[dim] // 2).contiguous())


WRONG: dict[str, tuple[str, Callable[[dict[str, Any]], Change], str]] = {
    "narrow x": (LINEAR, lambda g: {"x": ones(M, 255)}, "x has 255 columns; the weight has K=256"),
    "wide x": (LINEAR, lambda g: {"x": ones(1, 2, 257)}, r"N=64 takes x of shape \[..., 256\]"),
    "x of one": (LINEAR, lambda g: {"x": ones(1)}, "x has 1 columns"),
    "scalar x": (LINEAR, lambda g: {"x": ones()}, "x has no columns; the weight has K=256"),
    "no rows": (LINEAR, lambda g: {"x": torch.ones(0, 255)}, "x has 255 columns"),
    "short bias": (LINEAR, lambda g: {"bias": ones(63)}, r"bias has the shape \(63,\).*\(64,\)"),
    "bias of one": (LINEAR, lambda g: {"bias": ones(1)}, "bias has the shape"),
    "matrix of biases": (LINEAR, lambda g: {"bias": ones(M, 64)}, "bias has the shape"),
    "bias of half a gated layer": (
        LINEAR,
        lambda g: {"n": 32, "gated": True, "bias": ones(32)},
        r"bias has the shape \(32,\).*\(64,\)",
    ),
    "type of bias": (LINEAR, lambda g: {"bias": ones(64, dtype=torch.float32)}, "torch.float32"),
    "narrow residual": (LINEAR, lambda g: {"residual": ones(M, 63)}, "residual has the shape"),
    "short residual": (LINEAR, lambda g: {"residual": ones(M - 1, 64)}, "residual has the shape"),
    "row of residual": (LINEAR, lambda g: {"residual": ones(64)}, "residual has the shape"),
    "type of residual": (
        LINEAR,
        lambda g: {"residual": ones(M, 64, dtype=torch.float16)},
        "residual .* is torch.float16",
    ),
    "more rows": (LINEAR, lambda g: {"n": 128}, "128 rows and K=256"),
    "gated by mistake": (LINEAR, lambda g: {"gated": True}, "128 rows and K=256"),
    "finer groups": (LINEAR, lambda g: {"group_size": 32}, "groups of 32"),
    "other bits": (LINEAR, lambda g: {"bits": 12 - g["bits"]}, "qweight and scale have the shapes"),
    "other levels": (LINEAR, lambda g: {"levels": "odd"}, "no format has . bits and odd levels"),
    "a larger k": (LINEAR, lambda g: {"k": 512, "x": ones(M, 512)}, "64 rows and K=512"),
    "half a weight": (LINEAR, lambda g: {"qweight": short(g, "qweight")}, "qweight and scale have"),
    "half the scales": (LINEAR, lambda g: {"scale": short(g, "scale")}, "qweight and scale have"),
    "rows to dequantize": (DEQUANTIZE, lambda g: {"rows": 65536}, "65536 rows and K=256"),
    "columns to dequantize": (DEQUANTIZE, lambda g: {"k": 512}, "64 rows and K=512"),
    "narrow rows, gathered": (GATHERED, lambda g: {"x": ones(M, 255)}, "x has 255 columns"),
    "narrow rows, grouped": (GROUPED, lambda g: {"x": ones(M, 255)}, "x has 255 columns"),
    "dimensions": (GATHERED, lambda g: {"x": ones(1, M, K)}, "x has 3 dimensions"),
    "too few ids": (GATHERED, lambda g: {"ids": whole(0, 1)}, "2 ids for 3 rows of x"),
    "too few offsets": (GROUPED, lambda g: {"offsets": whole(3)}, "1 offsets for 2 experts"),
    "too many offsets": (
        GROUPED,
        lambda g: {"offsets": whole(1, 2, 3)},
        "3 offsets for 2 experts",
    ),
    "matrix of ids": (
        GATHERED,
        lambda g: {"ids": whole(0, 1, 0)[None]},
        "routing has 2 dimensions",
    ),
    "short ids": (
        GATHERED,
        lambda g: {"ids": whole(0, 1, 0, dtype=torch.int16)},
        "routing is torch.int16; it must be int32 or int64",
    ),
    "one bias for all": (GROUPED, lambda g: {"bias": ones(64)}, r"takes one of \(2, 64\)"),
    "too few biases": (GATHERED, lambda g: {"bias": ones(1, 64)}, r"one of \(2, 64\)"),
    "type of biases": (
        GATHERED,
        lambda g: {"bias": ones(2, 64, dtype=torch.float32)},
        "bias .* is torch.float32",
    ),
    "fewer experts' scales": (
        GATHERED,
        lambda g: {"scale": at_end_of_page(g["scale"][:1])},
        "of each expert",
    ),
    "larger experts": (GROUPED, lambda g: {"n": 128}, "128 rows .* of each expert"),
    "narrow dz": (BACKWARD, lambda g: {"dz": ones(M, 63)}, "dz has 63 columns"),
    "offsets of dz": (BACKWARD, lambda g: {"offsets": whole(3)}, "1 offsets for 2 experts"),
    "no routing": (BACKWARD, lambda g: {"offsets": None}, "by one of the two"),
    "two routings": (BACKWARD, lambda g: {"ids": whole(0, 1, 0)}, "by one of the two"),
    "residual of experts": (
        GROUPED,
        lambda g: {"residual": ones(M, 64)},
        "rows of experts take no residual",
    ),
    "offsets and ids": (GROUPED, lambda g: {"ids": whole(0, 1, 0)}, "by one of the two"),
    "rest of one matrix": (
        LINEAR,
        lambda g: {"zero_rest": True},
        "zero_rest=True .* needs offsets",
    ),
    "rest by ids": (GATHERED, lambda g: {"zero_rest": True}, "zero_rest=True .* needs offsets"),
    "k of dx": (BACKWARD, lambda g: {"k": 512}, "64 rows and K=512"),
}


@contextmanager
def faked() -> Iterator[None]:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        yield


def real() -> AbstractContextManager[None]:
    return nullcontext()


@pytest.mark.parametrize("where", [real, faked], ids=["implementation", "fake"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_refused_by_its_sizes(
    name: str, template: str, where: Callable[[], AbstractContextManager[None]]
) -> None:
    call, change, message = WRONG[name]
    given = arguments(call, template)
    wrong = given | change(given)
    with where(), pytest.raises(RuntimeError, match=message):
        OPS[call](**wrong)


@pytest.mark.parametrize("call", [LINEAR, GATHERED, GROUPED, DEQUANTIZE])
@pytest.mark.parametrize("template", [t for t in TEMPLATES if not t.startswith("triton")])
def test_right_arguments_are_not_refused(call: str, template: str) -> None:
    if call == DEQUANTIZE and TEMPLATES[template].layout.dequantize is None:
        pytest.skip("its layout cannot be dequantized")
    given = arguments(call, template)
    with faked():
        like = OPS[call](**given)
    y = OPS[call](**given)
    assert (like.shape, like.dtype) == (y.shape, y.dtype)


@pytest.mark.parametrize("call", OPS)
def test_tensors_on_several_devices_are_refused(call: str) -> None:
    """Whichever of them is elsewhere: on a CPU no implementation asks, as none is called."""
    given = arguments(call, "x86_stream")
    given |= {name: torch.ones(N, dtype=BF16) for name in ("bias",) if call == LINEAR}
    for name in [name for name, value in given.items() if isinstance(value, Tensor)]:
        with pytest.raises(RuntimeError, match="to be on the same device, but found"):
            OPS[call](**given | {name: given[name].to("meta")})


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64])
def test_types_that_the_x86_kernel_has_not_are_refused_as_dense_ones_are(
    dtype: torch.dtype,
) -> None:
    given = arguments(LINEAR, "x86_stream")
    with pytest.raises(RuntimeError, match=f"takes fp32, bf16 and fp16, not {dtype}"):
        matmul(**given | {"x": given["x"].to(dtype)})
    with pytest.raises(RuntimeError, match=r"fp16, not torch\.float64"):
        matmul(**given | {"scale": given["scale"].double()})


@pytest.mark.parametrize("where", [real, faked], ids=["implementation", "fake"])
@pytest.mark.parametrize("call", [LINEAR, GATHERED])
def test_unknown_kernels_and_activations_are_named(
    call: str, where: Callable[[], AbstractContextManager[None]]
) -> None:
    given = arguments(call, "dequantize")
    with where():
        with pytest.raises(OptionError, match="activation='tanh' is not one of none, relu"):
            matmul(**given | {"activation": "tanh"})
        with pytest.raises(NoKernelError, match="kernel 'nothing' is not installed"):
            matmul(**given | {"kernel": "nothing"})


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@given(
    rows=st.integers(1, 300),
    k=st.integers(1, 600),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([1, 5, 16, 32, 48, 64, 128, 256, 320, 1000]),
)
def test_a_layout_says_the_shapes_that_it_packs(
    layout: Layout, rows: int, k: int, bits: int, group: int
) -> None:
    if layout.name == "aten_int4_cpu":  # what its template takes
        rows, k, bits, group = rows * 64, k * 32, 4, 32
    group = min(group, k)
    packed = layout.pack(plain(rows, k, bits, group))
    assert layout.shapes(bits, group, rows, k) == tuple(tuple(t.shape) for t in packed.tensors)

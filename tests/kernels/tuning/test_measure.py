"""Measuring, as far as it needs no GPU: the problem, the gate for wrong results, the statistics."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fqcompile.errors import FineQuantError
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.registry import select_kernel
from fqcompile.kernels.spec import DENSE, GemmSpec, gpu_of
from fqcompile.kernels.template import DEQUANTIZE, PLAIN, Template
from fqcompile.kernels.tuning import measure as measure_module
from fqcompile.kernels.tuning.measure import (
    DeviceLost,
    WrongResult,
    allowed_error,
    captured,
    difference,
    measure_on_gpu,
    random_problem,
    reference,
    replayed,
    rotation,
    timing_of,
)
from fqcompile.kernels.tuning.table import Timing
from fqcompile.tensor.format import Format
from fqcompile.tensor.quantized import QuantizedTensor

CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16)
BASE = GemmSpec(24, 320, 512, 4, 64, torch.bfloat16, torch.bfloat16, "cpu")


@given(st.integers(1, 1 << 32))
def test_rotated_copies_exceed_the_cache_and_calls_outweigh_the_graphs_start(nbytes: int) -> None:
    copies, rounds = rotation(nbytes)
    assert copies >= 2
    assert copies * nbytes > 256 << 20 or copies == 257
    assert copies == 2 or (copies - 1) * nbytes <= 256 << 20
    assert copies * rounds >= 16
    assert rounds == 1 or copies * (rounds - 1) < 16


def test_a_timing_has_the_median_and_the_middle_three_fifths() -> None:
    timing = timing_of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (timing.low, timing.microseconds, timing.high) == (2.0, 3.5, 5.0)


@given(st.floats(0.1, 1e6), st.integers(2, 30))
def test_equal_times_are_a_timing(microseconds: float, replays: int) -> None:
    assert timing_of([microseconds] * replays).microseconds == microseconds


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_problem_has_no_zeros_and_fits_the_dtype(bits: int, dtype: torch.dtype) -> None:
    spec = replace(BASE, bits=bits, dtype=dtype, scale_dtype=dtype, k=500, gated=True)
    weight, x = random_problem(spec, 24, CPU)
    assert weight.shape == (640, 500)
    assert weight.scale.shape == (640, 8)
    assert (x.dtype, weight.scale.dtype) == (dtype, dtype)
    w = weight.dequantize(torch.float64)
    assert w.unique().numel() > 1000
    assert bool((weight.scale != 0).all())
    z = x.double() @ w.t()
    assert 0.2 < float(z.std()) < 2
    assert float(z.abs().max()) < 16


def test_the_problem_is_the_same_each_time_and_leaves_the_callers_random_state() -> None:
    state = torch.get_rng_state()
    problems = [random_problem(BASE, 3, CPU) for _ in range(2)]
    assert torch.equal(problems[0][1], problems[1][1])
    assert torch.equal(problems[0][0].qweight, problems[1][0].qweight)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_reference_is_the_formula() -> None:
    spec = replace(BASE, n=6, k=70, group_size=32, gated=True, activation="silu")
    weight, x = random_problem(spec, 5, CPU)
    codes = torch.stack((weight.qweight & 15, weight.qweight >> 4), -1).view(12, 70).double() - 8
    scale = weight.scale.double().repeat_interleave(32, 1)[:, :70]
    gate, up = (x.double() @ (codes * scale).t()).split(6, 1)
    expected = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(reference(x, weight, spec), expected, rtol=1e-12, atol=1e-12)


def _run(spec: GemmSpec, weight: QuantizedTensor, x: Tensor) -> Tensor:
    shape = (spec.bits, spec.group_size, spec.weight_rows, spec.k)
    packed = QuantizedTensor(weight.qweight, weight.scale, Format(*shape))
    return DEQUANTIZE.run(x, packed, None, Epilogue(None, None, spec.activation, spec.gated), None)


FORMS = [("none", False), ("relu", False), ("gelu", False), ("silu", True), ("gelu_tanh", True)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "gated"), FORMS)
def test_a_right_kernel_is_let_through(
    activation: str, gated: bool, dtype: torch.dtype, bits: int
) -> None:
    # DEQUANTIZE rounds the most: weights, the product, the activation, the product with up.
    spec = replace(
        BASE, dtype=dtype, scale_dtype=dtype, bits=bits, activation=activation, gated=gated, k=2048
    )
    weight, x = random_problem(spec, 24, CPU)
    assert difference(_run(spec, weight, x), reference(x, weight, spec), spec.k) is None


def _wrong_group(weight: QuantizedTensor, x: Tensor) -> None:
    weight.scale[:, 1] = weight.scale[:, 0]


def _wrong_row(weight: QuantizedTensor, x: Tensor) -> None:
    weight.qweight[7] = weight.qweight[8]


def _swapped_nibbles(weight: QuantizedTensor, x: Tensor) -> None:
    weight.qweight[:, 3] = weight.qweight[:, 3] >> 4 | weight.qweight[:, 3] << 4


def _last_columns_unread(weight: QuantizedTensor, x: Tensor) -> None:
    x[:, -8:] = 0


def _wrong_x(weight: QuantizedTensor, x: Tensor) -> None:
    x[23] = x[22]


BUGS = [_wrong_group, _wrong_row, _swapped_nibbles, _last_columns_unread, _wrong_x]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_wrong_kernel_is_refused(
    bug: Callable[[QuantizedTensor, Tensor], None], dtype: torch.dtype
) -> None:
    spec = replace(BASE, dtype=dtype, scale_dtype=dtype)
    weight, x = random_problem(spec, 24, CPU)
    expected = reference(x, weight, spec)
    bug(weight, x)
    assert difference(_run(spec, weight, x), expected, spec.k) is not None


def test_a_wrong_result_is_told_by_its_kind() -> None:
    weight, x = random_problem(BASE, 24, CPU)
    right, expected = _run(BASE, weight, x), reference(x, weight, BASE)
    one = right.clone()
    one[3, 5] += 0.25
    found, wanted = float(one[3, 5]), float(expected[3, 5])
    told = f"an element is {found:.4g} where {wanted:.4g} is expected"
    assert difference(one, expected, BASE.k) == told
    assert "relative error 1, allowed 0.0078" in str(difference(0 * right, expected, BASE.k))
    one[3, 5] = torch.nan
    assert difference(one, expected, BASE.k) == "not all elements are finite"
    assert difference(right[:5], expected, BASE.k) == "shape (5, 320), expected (24, 320)"


def test_the_allowed_error_follows_the_dtype_and_k() -> None:
    assert allowed_error(torch.bfloat16, 1) == pytest.approx(2 * 2.0**-8, rel=1e-4)
    assert allowed_error(torch.float16, 1) == pytest.approx(2 * 2.0**-11, rel=1e-3)
    assert allowed_error(torch.float16, 1 << 12) == pytest.approx(2.0**-10 + 2.0**-12)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """measure_on_gpu on a CPU, with a small cache and without a clock; the copies of each call."""
    calls: list[int] = []

    def run_once(rotate: Callable[[], list[Tensor]], rounds: int, copies: int) -> Timing:
        results = rotate()
        assert len({y.data_ptr() for y in results}) == len(results) == copies
        calls.append(rounds * copies)
        return Timing(1.0, 1.0, 1.0)

    monkeypatch.setattr(measure_module, "_DEVICE", CPU)
    monkeypatch.setattr(measure_module, "_time", run_once)
    monkeypatch.setattr(measure_module, "ROTATED_BYTES", 1 << 20)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return calls


def test_each_trial_reads_all_copies_of_one_packed_weight(no_gpu: list[int]) -> None:
    seen: list[tuple[int, ...]] = []

    def run(x: Tensor, weight: QuantizedTensor, *rest: object) -> Tensor:
        seen.append((weight.qweight.data_ptr(), weight.scale.data_ptr()))
        return DEQUANTIZE.run(x, weight, *rest)  # type: ignore[arg-type]

    packs: list[QuantizedTensor] = []
    layout = replace(PLAIN, name="other", pack_matrix=lambda w: packs.append(w) or w.tensors)
    measure = measure_on_gpu(replace(DEQUANTIZE, layout=layout, run=run), BASE, 3)
    for config in (DENSE, DENSE):
        assert measure(config) == Timing(1.0, 1.0, 1.0)
    copies = (1 << 20) // (packs[0].nbytes) + 1
    assert len(packs) == 1
    assert len(seen) == 2 * (copies + 1)
    assert len({pointer for pair in seen for pointer in pair}) == 2 * copies
    assert no_gpu == [copies * -(-16 // copies)] * 2


def test_a_graph_is_replayed_between_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class Graph:
        def replay(self) -> None:
            clock[0] += 2.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(
        torch.cuda, "graph", lambda graph, stream, capture_error_mode: nullcontext()
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "its own")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls: list[int] = []
    graph = captured(lambda: calls.append(1), 3)
    assert len(calls) == 3
    assert replayed(graph, 2, 4) == [2000.0] * 4
    assert clock == [12.0]


def _raising(error: Exception) -> Template:
    def run(*_: object) -> Tensor:
        raise error

    return replace(DEQUANTIZE, run=run)


def test_a_wrong_kernel_is_never_timed(no_gpu: list[int]) -> None:
    def run(x: Tensor, *rest: object) -> Tensor:
        return 2 * DEQUANTIZE.run(x, *rest)  # type: ignore[arg-type]

    with pytest.raises(WrongResult, match="relative error 1, allowed"):
        measure_on_gpu(replace(DEQUANTIZE, run=run), BASE, 3)(DENSE)
    assert not no_gpu


def test_a_failure_is_the_kernels_own_unless_the_gpu_is_gone(
    no_gpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = measure_on_gpu(_raising(RuntimeError("out of resource")), BASE, 3)
    with pytest.raises(RuntimeError, match=r"^out of resource$"):
        measure(DENSE)

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceLost, match=r"^out of resource; the GPU then answers CUDA error: an"):
        measure(DENSE)


def test_nothing_is_measured_while_a_graph_is_captured(
    no_gpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(FineQuantError, match="call the model once before capturing"):
        measure_on_gpu(DEQUANTIZE, BASE, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels on a GPU")
@pytest.mark.parametrize("gated", [False, True])
def test_the_closed_form_is_right_and_takes_a_believable_time(gated: bool) -> None:
    gpu = gpu_of(torch.device("cuda"))
    spec = replace(BASE, n=4096, k=4096, device_type="cuda", gated=gated, gpu=gpu, m=16)
    template = select_kernel(spec).template
    launches = template.launches(spec)
    assert launches is not None
    timing = measure_on_gpu(template, spec, 16)(launches.at(16))
    least = spec.weight_rows * spec.k / 2 / gpu.bandwidth
    # Faster than memory means that weights came from a cache; the rest is for a broken clock.
    assert 1e6 * least < timing.microseconds < 100e6 * least

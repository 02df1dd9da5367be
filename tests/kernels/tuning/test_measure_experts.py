"""What measuring experts needs beside one matrix; and measuring, as far as it needs no GPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fqcompile.kernels.cpu.stream import X86_STREAM
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.spec import DENSE, GemmSpec
from fqcompile.kernels.template import DEQUANTIZE
from fqcompile.kernels.tuning import measure as measure_module
from fqcompile.kernels.tuning.measure import (
    WrongResult,
    expert_reference,
    measure_on_gpu,
    random_problem,
    routings,
)
from fqcompile.kernels.tuning.table import Timing
from fqcompile.tensor.format import Format
from fqcompile.tensor.quantized import QuantizedTensor

CPU = torch.device("cpu")
BASE = GemmSpec(
    5, 24, 70, 4, 32, torch.bfloat16, torch.bfloat16, "cpu", "silu", True,
    experts=12, routing="grouped",
)  # fmt: skip
every_routing = pytest.mark.parametrize("routing", ["grouped", "gathered"])


@every_routing
@pytest.mark.parametrize("m", [1, 3, 40, 1000])
def test_calls_in_turn_hit_as_many_experts_and_no_two_the_same(routing: str, m: int) -> None:
    spec = replace(BASE, routing=routing)
    hits: list[set[int]] = []
    for one in routings(spec, m, CPU):
        found = dict(one.rows_of_experts(12, m))
        rows = [torch.arange(m)[own] for own in found.values()]
        assert torch.cat(rows).sort().values.tolist() == list(range(m))
        hits.append(set(found))
    assert len({len(hit) for hit in hits}) == 1
    assert sum(map(len, hits)) == len(set.union(*hits)) > 12 - len(hits[0])


def test_the_problem_is_a_stack_whose_experts_are_packed_one_by_one() -> None:
    stack, x = random_problem(BASE, 5, CPU)
    assert stack.format == Format(4, 32, 48, 70, 12)
    assert x.shape == (5, 70)
    packed = X86_STREAM.layout.pack(stack)
    for e in range(12):
        one = X86_STREAM.layout.pack(stack.expert(e))
        assert torch.equal(packed.qweight[e], one.qweight)
        assert torch.equal(packed.scale[e], one.scale)


@every_routing
def test_the_reference_is_each_rows_own_expert(routing: str) -> None:
    spec = replace(BASE, routing=routing)
    stack, x = random_problem(spec, 30, CPU)
    one = routings(spec, 30, CPU)[0]
    if one.ids is not None:
        own = one.ids
    else:
        counts = torch.diff(one.offsets, prepend=torch.zeros(1, dtype=torch.int32))
        own = torch.repeat_interleave(torch.arange(12), counts)
    z = torch.einsum("mk,mnk->mn", x.double(), stack.dequantize(torch.float64)[own])
    want = Epilogue(activation="silu", gated=True).apply(z)
    torch.testing.assert_close(expert_reference(x, stack, one, spec), want)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """measure_on_gpu on a CPU, with a small cache and without a clock; the copies of each call."""
    calls: list[int] = []

    def run_once(rotate: Callable[[], list[Tensor]], rounds: int, copies: int) -> Timing:
        assert len(rotate()) == copies
        calls.append(copies)
        return Timing(1.0, 1.0, 1.0)

    monkeypatch.setattr(measure_module, "_DEVICE", CPU)
    monkeypatch.setattr(measure_module, "_time", run_once)
    monkeypatch.setattr(measure_module, "ROTATED_BYTES", 40_000)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return calls


@every_routing
def test_a_trial_reads_every_expert_of_every_copy_in_turn(routing: str, no_gpu: list[int]) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []

    def run(x: Tensor, weight: QuantizedTensor, told: Any, *rest: Any) -> Tensor:
        offsets, ids = told
        assert (offsets is None) == (routing == "gathered")
        seen.append(
            (weight.qweight.data_ptr(), tuple((ids if offsets is None else offsets).tolist()))
        )
        return DEQUANTIZE.run(x, weight, told, *rest)

    template = replace(DEQUANTIZE, run=run)
    measure = measure_on_gpu(template, replace(BASE, routing=routing), 3)
    assert measure(DENSE) == Timing(1.0, 1.0, 1.0)
    runs = seen[1:]  # after the one that was held against the reference
    assert no_gpu == [len(runs)]
    copies = len({pointer for pointer, _ in runs})
    nbytes = 12 * 48 * 35  # codes; scales come on top
    assert copies == 40_000 // nbytes + 1
    assert len(set(runs)) == len(runs) == copies * (12 // 3)


def test_a_kernel_that_mixes_experts_up_is_never_timed(no_gpu: list[int]) -> None:
    def run(x: Tensor, weight: QuantizedTensor, *rest: Any) -> Tensor:
        return DEQUANTIZE.run(x, replace(weight, qweight=weight.qweight.roll(1, 0)), *rest)

    measure = measure_on_gpu(replace(DEQUANTIZE, run=run), replace(BASE, m=30), 30)
    with pytest.raises(WrongResult):
        measure(DENSE)
    assert not no_gpu

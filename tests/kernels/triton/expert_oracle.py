"""Cases for the kernels of experts: each expert's rows held against the oracle of one matrix.

Which rows those are is found here by counting, not by searching.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.template import Routing
from fqcompile.kernels.triton import launch
from fqcompile.tensor.quantized import QuantizedTensor
from tests.kernels.triton.oracle import (
    Case,
    Inputs,
    expected,
    group_of,
    inside_nans,
    levels_of,
    on_device,
    packed,
    random_codes,
    random_scale,
    running,
)


@dataclass(frozen=True)
class ExpertCase:
    """`one` says all but the rows; either `offsets` and `tail` rows beyond the last, or `ids`."""

    offsets: tuple[int, ...] | None = None
    ids: tuple[int, ...] | None = None
    experts: int = 3
    tail: int = 0
    index_dtype: torch.dtype = torch.int64
    one: Case = field(default_factory=partial(Case, n=20, k=130))

    @property
    def m(self) -> int:
        return len(self.ids) if self.ids is not None else self.of_rows.shape[0]

    @property
    def stack(self) -> int:
        return self.experts if self.offsets is None else len(self.offsets)

    @property
    def of_rows(self) -> Tensor:
        """int64 [M]: each row's expert; -1 where it has none."""
        if self.ids is not None:
            own = [i + self.experts if i < 0 else i for i in self.ids]
            return torch.tensor([i if 0 <= i < self.experts else -1 for i in own])
        assert self.offsets is not None
        start, found = 0, []
        for expert, end in enumerate(self.offsets):
            found += [expert] * (end - start)
            start = end
        return torch.tensor([*found, *[-1] * self.tail], dtype=torch.int64)

    def routing(self, device: str = "cpu") -> Routing:
        make = partial(torch.tensor, dtype=self.index_dtype, device=device)
        if self.ids is not None:
            return Routing(ids=make(self.ids))
        return Routing(offsets=make(self.offsets))


@dataclass(frozen=True)
class ExpertInputs:
    """x [M, K]; of each expert its codes, scale, and ŵ in fp64; bias [E, rows]."""

    x: Tensor
    codes: list[Tensor]
    scale: list[Tensor]
    w: list[Tensor]
    bias: Tensor | None


def draw(case: ExpertCase) -> ExpertInputs:
    """x is rows inside NaNs, those beyond the last offset too; unused experts are NaN."""
    one = case.one
    torch.manual_seed(one.seed)
    codes = [random_codes(one.bits, one.rows, one.k) for _ in range(case.stack)]
    scale = [random_scale(one) for _ in range(case.stack)]
    own = case.of_rows
    for expert in set(range(case.stack)) - set(own.tolist()):
        scale[expert][:] = torch.nan
    groups = group_of(one.k, one.group_size)
    x = torch.randn(case.m, one.k).to(one.dtype)
    if case.ids is None:
        x[own < 0] = torch.nan
    bias = torch.randn(case.stack, 2 * one.rows).to(one.dtype)[:, ::2]
    return ExpertInputs(
        inside_nans(x),
        codes,
        scale,
        [
            levels_of(c, one.bits, one.levels) * s.double()[:, groups]
            for c, s in zip(codes, scale, strict=True)
        ],
        bias if one.bias else None,
    )


def stacked(case: ExpertCase, inputs: ExpertInputs, device: str = "cpu") -> QuantizedTensor:
    one = case.one
    each = [
        packed(c, s, one.bits, one.group_size, one.kwidth, device, one.levels)
        for c, s in zip(inputs.codes, inputs.scale, strict=True)
    ]
    return QuantizedTensor.stack(each)


def run(
    case: ExpertCase, inputs: ExpertInputs, device: str = "cpu", order: int | None = None
) -> Tensor:
    """What the family computes; of rows that belong to no expert nothing is written."""
    one, weight = case.one, stacked(case, inputs, device)
    x, bias = (on_device(t, device) for t in (inputs.x, inputs.bias))
    with pytest.MonkeyPatch.context() as patch, running(device, order) as memory:
        patch.setattr(launch, "conversion", lambda device, dtype: one.conversion)
        epilogue = Epilogue(bias, None, one.activation, one.gated)
        y = launch.expert_gemm(x, weight, case.routing(device), epilogue, one.config, one.kwidth)
        if memory is not None:
            without = case.tail if case.ids is None else 0
            assert memory.unwritten(y) == without * one.n
            assert memory.unwritten(y[: case.m - without]) == 0
    assert (y.dtype, y.shape) == (one.dtype, (case.m, one.n))
    return y.cpu()


def bounds(case: ExpertCase, inputs: ExpertInputs) -> tuple[Tensor, Tensor]:
    """The result in fp64 and its tolerance; NaN and 0 for rows without an expert."""
    want = torch.full((case.m, case.one.n), torch.nan, dtype=torch.float64)
    tolerance = torch.zeros_like(want)
    own = case.of_rows
    for expert in own[own >= 0].unique().tolist():
        rows = own == expert
        bias = None if inputs.bias is None else inputs.bias[expert]
        codes, scale, w = (each[expert] for each in (inputs.codes, inputs.scale, inputs.w))
        of_one = Inputs(inputs.x[rows], codes, scale, w, bias, None)
        want[rows], tolerance[rows] = expected(replace(case.one, m=int(rows.sum())), of_one)
    return want, tolerance


def assert_close(case: ExpertCase, inputs: ExpertInputs, y: Tensor) -> None:
    want, tolerance = bounds(case, inputs)
    has_expert = case.of_rows >= 0
    excess = ((y.double() - want).abs() / tolerance)[has_expert].nan_to_num(nan=torch.inf)
    assert not (excess > 1).any(), f"{excess.max():.3g} times the tolerance: {case}"
    if case.ids is not None:
        assert y[~has_expert].isnan().all()


def check(case: ExpertCase, device: str = "cpu") -> None:
    inputs = draw(case)
    assert_close(case, inputs, run(case, inputs, device))

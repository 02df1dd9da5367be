"""The machine code of the kernels of experts keeps the budgets that those of one matrix have.

And `bench.static.expert_launches` launches what `triton.launch` does.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.jit import JITFunction

from bench.static import expert_launches, launches
from bench.static.expert_launches import layer, routed
from bench.static.faults import faults, most_instructions
from bench.static.launches import CONVERSION, GPUS, Case
from bench.static.machine_code import Launch, toolchain_missing
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.spec import TileConfig
from fqcompile.kernels.template import Routing
from fqcompile.kernels.triton import launch
from fqcompile.kernels.triton.configs import candidates
from fqcompile.kernels.triton.cost import cost
from fqcompile.kernels.triton.target import kwidth
from fqcompile.tensor.format import Format
from fqcompile.tensor.quantized import QuantizedTensor
from tests.kernels.triton.oracle import EARLY
from tests.kernels.triton.test_static import BUDGETS as OF_ONE
from tests.kernels.triton.test_static import (
    SLACK,
    VERSION,
    Budget,
    launched,
    over_budget,
)

MISSING = toolchain_missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
CASES = [case for arch in GPUS for case in expert_launches.selection(arch)]
SPILLS = TileConfig(64, 64, 128, 1, 4, 3)
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))

# By Triton version: of kernels without a counterpart for one matrix, or with a few registers more.
BUDGETS: dict[str, dict[str, Budget]] = {
    "3.7": {
        "gathered 128x1536x2048 w4 g128 bf16 16x64x128x1w4s4 gated sm_90": Budget(113, 40960, 2.17),
        "finish gathered 128x1536x2048 w4 g128 bf16 gated sm_90": Budget(74, 0, 84.5),
        "grouped 128x1536x2048 w4 g128 bf16 16x64x128x1w4s4 gated sm_90": Budget(115, 40960, 2.19),
        "finish grouped 128x1536x2048 w4 g128 bf16 gated sm_90": Budget(74, 8, 90.75),
        "dequantize 128x2048x768 w4 normal g128 bf16 sm_90": Budget(37, 8192, 11.16),
        "dequantize 128x2048x768 w4 normal g128 bf16 sm_80": Budget(32, 8192, 12.16),
        "dequantize 128x2048x768 w4 g128 bf16 sm_90": Budget(37, 8192, 10.22),
        "finish gathered 128x1536x2048 w4 g128 bf16 gated sm_80": Budget(72, 0, 83.0),
        "grouped 128x2048x768 w4 g128 bf16 16x128x128x8w4s4 sm_80": Budget(118, 37376, 2.62),
        "finish grouped 128x1536x2048 w4 g128 bf16 gated sm_80": Budget(72, 8, 87.0),
        "dequantize 128x2048x768 w4 g128 bf16 sm_80": Budget(32, 8192, 11.72),
    }
}


def budget_of(case: Case) -> Budget | None:
    """Its own, or that of the same tile and format in `gemm_kernel`."""
    own = BUDGETS[VERSION].get(case.name)
    if own is not None:
        return own
    _, _, rest = case.name.partition("x")
    _, _, form = rest.partition(" ")
    return OF_ONE[VERSION].get(f"gemm {form}")


@by_name
def test_machine_code_has_no_fault_and_keeps_its_budget(case: Case) -> None:
    if VERSION not in OF_ONE:
        pytest.skip(f"no budgets for Triton {VERSION}: add those of `python -m bench static`")
    code, budget = case.read(), budget_of(case)
    assert budget is not None, "neither a budget of its own nor one of the dense family"
    assert faults(case, code) == []
    assert code.spills == code.stack_bytes == code.local_bytes == 0
    assert over_budget(code, case.weights, budget) == []
    most = most_instructions(case)
    assert most is None or code.per_weight(case.weights) <= most


@pytest.mark.parametrize("version", BUDGETS)
def test_budgets_are_of_cases_that_there_are(version: str) -> None:
    assert set(BUDGETS[version]) <= {case.name for case in CASES}


@by_name
def test_routing_costs_no_instruction_in_the_loop(case: Case) -> None:
    """But for what the compiler orders otherwise: 5 % of the loop of one matrix."""
    if case.config is None:
        return
    one = replace(case.spec, experts=0, routing=None)
    dense = launches.gemm(one, case.config).read()
    code = case.read()
    assert code.instructions / code.unroll <= SLACK * dense.instructions / dense.unroll
    assert code.resident_programs() >= dense.resident_programs() - 1


@by_name
def test_the_model_is_near_the_machine_code(case: Case) -> None:
    if case.config is None or VERSION not in OF_ONE:
        return
    code, model = case.read(), cost(case.spec, case.config, case.gpu, 16)
    near = 0.12 if case.config.BLOCK_M == 16 else 0.25
    assert model.instructions == pytest.approx(code.per_weight(case.weights), rel=near)
    assert 0.95 <= model.shared_bytes / code.shared_bytes <= 1.15
    assert 0.65 <= model.registers / code.registers <= 1.5


@pytest.mark.parametrize("arch", list(GPUS))
def test_strides_between_experts_that_are_not_known_to_be_whole_lines_are_seen(arch: int) -> None:
    """What the lint is for: without the hints the copies of a stack are narrow."""
    case = routed(
        layer("qwen3-30b-a3b", "down", "grouped", gpu=GPUS[arch]), TileConfig(16, 128, 128)
    )
    unknown = replace(case, launch=replace(case.launch, divisible=()))
    assert "copies of 16 bytes" in " ".join(faults(unknown, unknown.read()))


def test_what_is_chosen_for_two_sums_of_many_rows_holds_in_the_registers() -> None:
    """The model of registers does not see it; the machine code of 64 x 64 on sm_80 does."""
    spilled = routed(layer("mixtral-8x7b", "gate_up", "grouped", gpu=GPUS[80]), SPILLS)
    assert "spills" in " ".join(faults(spilled, spilled.read()))
    tiles = candidates(replace(spilled.spec, m=8192), 8192, "max")
    assert SPILLS not in tiles
    assert any(isinstance(tile, TileConfig) and tile.BLOCK_M == 32 for tile in tiles)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """The launches made, none of which runs."""
    made: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: int) -> None:
        made.append(launched(self, args, options))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launch, "conversion", lambda device, dtype: CONVERSION)
    yield made


@by_name
def test_the_cases_are_what_is_launched(
    case: Case, calls: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    s, empty = case.spec, torch.empty
    early = EARLY if launches.starts_early(s) else {}
    monkeypatch.setattr(launch, "early_launch", lambda device: early)
    with torch.device("meta"):
        codes = empty(s.experts, 1, 1, 1, 1, dtype=torch.int32)
        scales = empty(s.experts, 1, dtype=s.scale_dtype)
        weight = QuantizedTensor(
            codes, scales, Format(s.bits, s.group_size, s.weight_rows, s.k, levels=s.levels)
        )
        x = empty(s.m, s.k, dtype=s.dtype)
        bias = empty(s.experts, s.weight_rows, dtype=s.dtype) if s.has_bias else None
        offsets, ids = empty(s.experts, dtype=torch.int32), empty(s.m, dtype=torch.int64)
        if case.kind == "dequantize":
            launch.dequantize(weight, s.dtype, kwidth(case.gpu))
        else:
            routing = Routing(offsets) if s.routing == "grouped" else Routing(ids=ids)
            shares = launches.FINISHED_SHARES
            config = case.config or TileConfig(16, 128, 128, shares, 4, 4)
            epilogue = Epilogue(bias, None, s.activation, s.gated)
            launch.expert_gemm(x, weight, routing, epilogue, config, kwidth(case.gpu))
    (made,) = (call for call in calls if call.kernel is case.launch.kernel)
    assert made == replace(case.launch, divisible=set(case.launch.divisible))

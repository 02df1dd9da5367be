"""The machine code of what is launched has no faults and keeps to its budget.

Kernels that were made to have a fault are seen to have it.
"""

import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.runtime.jit import JITFunction

from bench import __main__ as command
from bench.static import launches
from bench.static import run as static
from bench.static.expert_launches import layer, routed
from bench.static.faults import faults, most_instructions
from bench.static.launches import (
    CONVERSION,
    FORMATS,
    GPUS,
    TYPES,
    Case,
    dequantize,
    gemm,
    plain,
    spec,
    starts_early,
)
from bench.static.machine_code import Launch, MachineCode, compile_for, toolchain_missing
from bench.static.plain import plain_kernel
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.spec import A100, H200, TileConfig
from fqcompile.kernels.triton import launch
from fqcompile.kernels.triton.target import kwidth
from fqcompile.tensor.format import Format
from fqcompile.tensor.quantized import QuantizedTensor
from tests.kernels.triton.interpreter import interpreted
from tests.kernels.triton.oracle import EARLY

MISSING = toolchain_missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
on_every_arch = pytest.mark.parametrize("arch", list(GPUS))

VERSION = ".".join(triton.__version__.split(".")[:2])
SMALL, MEDIUM = TileConfig(16, 128, 128, 1, 4, 4), TileConfig(64, 128, 128, 1, 8, 3)
CASES = [case for arch in GPUS for case in launches.selection(arch)]


class Budget(NamedTuple):
    """Registers and shared bytes as measured, and instructions per weight."""

    registers: int
    shared_bytes: int
    instructions: float


SLACK = 1.05  # of what was measured: more is a regression
# By Triton version, of the cases of `launches.selection`.
BUDGETS: dict[str, dict[str, Budget]] = {
    "3.7": {
        "gemm w4 g128 bf16 16x128x128x1w4s4 sm_90": Budget(143, 41472, 2.11),
        "gemm w4 g128 fp16 16x128x128x1w4s4 sm_90": Budget(143, 41472, 2.11),
        "gemm w4 column bf16 16x128x128x1w4s4 sm_90": Budget(127, 40960, 2.0),
        "gemm w4 g64 fp16 16x128x128x1w4s4 sm_90": Budget(121, 41472, 2.34),
        "gemm w4 g32 bf16 16x128x128x1w4s4 sm_90": Budget(134, 41984, 2.86),
        "gemm w4 g16 bf16 16x128x128x1w4s4 sm_90": Budget(138, 43008, 3.59),
        "gemm w8 column bf16 16x128x128x1w4s4 sm_90": Budget(93, 65536, 2.20),
        "gemm w8 g128 fp16 16x128x128x1w4s4 sm_90": Budget(167, 66048, 2.07),
        "gemm w8 g32 bf16 16x128x128x1w4s4 sm_90": Budget(133, 66560, 2.77),
        "gemm w4 g128 bf16 16x128x128x8w4s4 sm_90": Budget(128, 41472, 2.12),
        "gemm w4 g128 bf16 16x128x128x8w4s4-last sm_90": Budget(165, 41472, 2.07),
        "gemm w4 g128 bf16 16x64x128x8w4s4-last gated sm_90": Budget(128, 40960, 2.20),
        "gemm w4 g128 bf16 16x64x128x1w4s4 gated sm_90": Budget(119, 40960, 2.20),
        "gemm w4 g128 bf16 64x128x128x1w8s3 sm_90": Budget(128, 65536, 3.30),
        "gemm w8 column bf16 128x128x128x1w8s3 sm_90": Budget(186, 131072, 3.00),
        "finish w4 g128 bf16 gated sm_90": Budget(72, 0, 80.75),
        "dequantize w4 g128 bf16 sm_90": Budget(32, 8192, 9.19),
        "dequantize w8 column bf16 sm_90": Budget(32, 4096, 9.47),
        "gemm w4 normal g128 bf16 16x128x128x1w4s4 sm_90": Budget(128, 41472, 3.09),
        "gemm w4 normal g128 fp16 16x128x128x1w4s4 sm_90": Budget(128, 41472, 3.09),
        "gemm w4 normal column bf16 16x128x128x1w4s4 sm_90": Budget(127, 40960, 2.97),
        "gemm w4 normal g64 fp16 16x128x128x1w4s4 sm_90": Budget(127, 41472, 3.33),
        "gemm w4 normal g32 bf16 16x128x128x1w4s4 sm_90": Budget(134, 41984, 3.85),
        "gemm w4 normal g16 bf16 16x128x128x1w4s4 sm_90": Budget(133, 43008, 4.99),
        "gemm w4 normal g128 bf16 16x128x128x8w4s4 sm_90": Budget(127, 41472, 3.06),
        "gemm w4 normal g128 bf16 16x64x128x1w4s4 gated sm_90": Budget(127, 40960, 3.16),
        "gemm w4 normal g128 bf16 64x128x128x1w8s3 sm_90": Budget(128, 65536, 4.25),
        "dequantize w4 normal g128 bf16 sm_90": Budget(32, 8192, 10.16),
        "gemm w4 g128 bf16 16x128x128x1w4s4 sm_80": Budget(122, 37376, 2.56),
        "gemm w4 g128 fp16 16x128x128x1w4s4 sm_80": Budget(122, 37376, 2.56),
        "gemm w4 column bf16 16x128x128x1w4s4 sm_80": Budget(96, 36864, 2.35),
        "gemm w4 g64 fp16 16x128x128x1w4s4 sm_80": Budget(122, 37376, 2.70),
        "gemm w4 g32 bf16 16x128x128x1w4s4 sm_80": Budget(128, 37888, 3.09),
        "gemm w4 g16 bf16 16x128x128x1w4s4 sm_80": Budget(140, 38912, 3.38),
        "gemm w8 column bf16 16x128x128x1w4s4 sm_80": Budget(110, 61440, 2.23),
        "gemm w8 g128 fp16 16x128x128x1w4s4 sm_80": Budget(122, 61952, 2.52),
        "gemm w8 g32 bf16 16x128x128x1w4s4 sm_80": Budget(154, 62464, 2.96),
        "gemm w4 g128 bf16 16x128x128x8w4s4 sm_80": Budget(112, 37376, 2.62),
        "gemm w4 g128 bf16 16x128x128x8w4s4-last sm_80": Budget(128, 37376, 2.59),
        "gemm w4 g128 bf16 16x64x128x8w4s4-last gated sm_80": Budget(128, 36864, 2.62),
        "gemm w4 g128 bf16 16x64x128x1w4s4 gated sm_80": Budget(126, 36864, 2.73),
        "gemm w4 g128 bf16 64x128x128x1w8s4 sm_80": Budget(181, 73728, 7.12),
        "gemm w8 column bf16 128x64x128x1w8s3 sm_80": Budget(178, 81920, 12.16),
        "finish w4 g128 bf16 gated sm_80": Budget(64, 0, 79.75),
        "dequantize w4 g128 bf16 sm_80": Budget(32, 8192, 10.66),
        "dequantize w8 column bf16 sm_80": Budget(32, 8192, 9.47),
        "gemm w4 normal g128 bf16 16x128x128x1w4s4 sm_80": Budget(128, 37376, 3.55),
        "gemm w4 normal g128 fp16 16x128x128x1w4s4 sm_80": Budget(128, 37376, 3.55),
        "gemm w4 normal column bf16 16x128x128x1w4s4 sm_80": Budget(96, 36864, 3.3),
        "gemm w4 normal g64 fp16 16x128x128x1w4s4 sm_80": Budget(128, 37376, 3.73),
        "gemm w4 normal g32 bf16 16x128x128x1w4s4 sm_80": Budget(128, 37888, 4.0),
        "gemm w4 normal g16 bf16 16x128x128x1w4s4 sm_80": Budget(123, 38912, 4.76),
        "gemm w4 normal g128 bf16 16x128x128x8w4s4 sm_80": Budget(120, 37376, 3.61),
        "gemm w4 normal g128 bf16 16x64x128x1w4s4 gated sm_80": Budget(122, 36864, 3.71),
        "gemm w4 normal g128 bf16 64x128x128x1w8s4 sm_80": Budget(188, 73728, 9.02),
        "dequantize w4 normal g128 bf16 sm_80": Budget(32, 8192, 11.12),
    },
}


def over_budget(code: MachineCode, weights: int, budget: Budget) -> list[str]:
    """What exceeds the budget by more than the slack."""
    unroll = code.unroll if code.has_loop else 1
    found = Budget(code.registers, code.shared_bytes, code.per_weight(weights, unroll))
    pairs = zip(Budget._fields, found, budget, strict=True)
    return [f"{name}: {now:g}, was {then:g}" for name, now, then in pairs if now > SLACK * then]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_machine_code_has_no_fault_and_keeps_its_budget(case: Case) -> None:
    if VERSION not in BUDGETS:
        pytest.skip(f"no budgets for Triton {VERSION}: add those of `python -m bench static`")
    code = case.read()
    assert faults(case, code) == []
    assert code.spills == code.stack_bytes == code.local_bytes == 0
    assert over_budget(code, case.weights, BUDGETS[VERSION][case.name]) == []


@pytest.mark.parametrize("version", BUDGETS)
def test_budgets_are_of_the_cases_and_reach_the_targets(version: str) -> None:
    cases = {case.name: case for case in CASES}
    assert len(cases) == len(CASES)
    assert set(BUDGETS[version]) == set(cases)
    for name, case in cases.items():
        most = most_instructions(case)
        assert most is None or BUDGETS[version][name].instructions <= most, name


@on_every_arch
def test_the_plain_formulation_is_limited_by_its_instructions(arch: int) -> None:
    case = plain(spec(4, 128, gpu=GPUS[arch]), SMALL)
    code = case.read()
    complaints = " ".join(faults(case, code))
    assert "memory takes" in complaints
    assert ("conversions from integers" in complaints) == (arch == 80)  # bf16 has a trick on Hopper
    ours = gemm(case.spec, SMALL).read().per_weight(case.weights)
    assert code.per_weight(case.weights) > 3 * ours


def test_the_plain_formulation_sends_the_weight_through_shared_memory() -> None:
    case = plain(spec(4, 128), MEDIUM)
    complaints = " ".join(faults(case, case.read()))
    assert "8 stores to shared memory for 64 weights" in complaints
    assert "0 of 8 products take the weight from registers" in complaints


def test_the_operand_order_of_another_instruction_is_a_round_trip() -> None:
    other = {2: 4, 4: 2}[kwidth(A100)]
    case = gemm(spec(4, 128, gpu=A100), SMALL, KWIDTH=other)
    assert "stores to shared memory" in " ".join(faults(case, case.read()))


@on_every_arch
def test_sizes_not_known_to_be_divisible_make_copies_narrow(arch: int) -> None:
    case = gemm(spec(4, 128, gpu=GPUS[arch]), SMALL)
    unknown = replace(case, launch=replace(case.launch, divisible=()))
    assert "copies of 16 bytes" in " ".join(faults(unknown, unknown.read()))


def test_sums_that_registers_do_not_hold_spill() -> None:
    case = gemm(spec(4, 128, gpu=A100, gated=True), TileConfig(64, 64, 128, 1, 4, 4))
    code = case.read()
    assert code.registers == 255 and code.spills > 50
    assert "spills" in faults(case, code)[0]


@on_every_arch
def test_a_thread_with_twice_the_weights_leaves_room_for_fewer_programs(arch: int) -> None:
    """Such tiles come last among candidates; they need not spill."""
    usual = replace(SMALL, num_stages=3)
    one, twice = (
        gemm(spec(4, 128, gpu=GPUS[arch]), tile).read()
        for tile in (usual, replace(usual, BLOCK_N=256))
    )
    assert twice.spills == 0
    assert one.registers < twice.registers
    assert one.resident_programs() > twice.resident_programs()


def test_a_loop_without_pipeline_has_too_little_under_way() -> None:
    case = gemm(spec(4, 128), replace(SMALL, num_stages=1))
    assert "0 bytes of weights in flight" in " ".join(faults(case, case.read()))


def test_another_conversion_exceeds_the_budget() -> None:
    case = gemm(spec(4, 128), SMALL)
    budget = BUDGETS.get(VERSION, {}).get(case.name) or Budget(999, 1 << 20, 2.2)
    exponent = gemm(case.spec, SMALL, CONVERSION="exponent").read()
    assert "instructions" in " ".join(over_budget(exponent, case.weights, budget))


@pytest.mark.parametrize("act", ["none", "relu", "gelu", "gelu_tanh"])
def test_every_activation_compiles(act: str) -> None:
    case = gemm(spec(4, 128, act=act), SMALL)
    assert faults(case, case.read()) == []


@pytest.mark.parametrize(
    "change", [{"BITS": 3}, {"LEVELS": "odd"}, {"ACTIVATION": None}, {"DOT_K": 96}]
)
def test_an_unknown_combination_does_not_compile(change: dict[str, Any]) -> None:
    with pytest.raises(triton.CompilationError):
        gemm(spec(4, 128), SMALL, **change).read()


@pytest.mark.parametrize(("bits", "levels"), FORMATS)
def test_the_kernels_compile_for_amd_without_spills(bits: int, levels: str) -> None:
    layer = spec(bits, 128, levels=levels)
    cases = [gemm(layer, SMALL, CONVERSION="subnormal", KWIDTH=2, PDL=False)]
    cases.append(dequantize(layer, CONVERSION="subnormal", KWIDTH=2))
    for case in cases:
        code = compile_for(case.launch, "gfx942").asm["amdgcn"]
        assert "vgpr_spill_count: 0" in code
        assert ("v_mfma" in code) == (case.kind == "gemm")


# That `bench.static.launches` and `fqcompile.kernels.triton.launch` launch the same.


def launched(kernel: Any, args: tuple[Any, ...], options: dict[str, int]) -> Launch:
    """What Triton would compile for this call."""
    named = {name: options.pop(name) for name in [*options] if name in kernel.arg_names}
    bound = inspect.signature(kernel.fn).bind(*args, **named)
    bound.apply_defaults()
    types = {torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"} | TYPES
    values = dict(bound.arguments)
    tensors = {name: t for name, t in values.items() if isinstance(t, torch.Tensor)}
    constants = {p.name for p in kernel.params if p.is_constexpr}
    constants |= {name for name, value in values.items() if value is None}
    special = {p.name for p in kernel.params if not p.do_not_specialize}
    integers = set(values) - set(tensors) - constants
    return Launch(
        kernel,
        {name: f"*{types[t.dtype]}" for name, t in tensors.items()},
        {name: values[name] for name in constants},
        {name for name in integers & special if values[name] % 16 == 0},
        **options,
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """The launches made, none of which runs."""
    made: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: int) -> None:
        made.append(launched(self, args, options))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launch, "conversion", lambda device, dtype: CONVERSION)
    yield made


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_the_cases_are_what_is_launched(
    case: Case, calls: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    s, empty = case.spec, torch.empty
    monkeypatch.setattr(launch, "early_launch", lambda device: EARLY if starts_early(s) else {})
    with torch.device("meta"):
        codes, scales = empty(1, dtype=torch.int32), empty(1, dtype=s.scale_dtype)
        weight = QuantizedTensor(
            codes, scales, Format(s.bits, s.group_size, s.weight_rows, s.k, levels=s.levels)
        )
        x, bias = empty(s.m, s.k, dtype=s.dtype), empty(s.weight_rows, dtype=s.dtype)
        residual = empty(s.m, s.n, dtype=s.dtype)
        if case.kind == "dequantize":
            launch.dequantize(weight, s.dtype, kwidth(case.gpu))
        else:
            config = case.config or replace(SMALL, SPLIT_K=launches.FINISHED_SHARES)
            epilogue = Epilogue(bias, residual, s.activation, s.gated)
            launch.dequant_gemm(x, weight, epilogue, config, kwidth(case.gpu))
    made = calls[-1 if case.kind == "finish" else 0]
    assert made == replace(case.launch, divisible=set(case.launch.divisible))


def test_the_plain_kernel_multiplies() -> None:
    codes, scale = torch.randint(16, (32, 64)), torch.rand(32, 2).half()
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    x, y = torch.randn(3, 64).half(), torch.empty(3, 32).half()
    with interpreted():
        plain_kernel[(2,)](x, packed, scale, y, 3, 32, 64, 64, 32, 2, 32, 16, 16, 32)
    w = ((codes - 8).half().view(32, 2, 32) * scale[..., None]).view(32, 64)
    torch.testing.assert_close(y.float(), x.float() @ w.float().T, rtol=2**-10, atol=1e-3)


# The command.


def test_the_table_shows_all_figures_and_names_what_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    good = gemm(spec(4, 128), SMALL)
    bad = replace(good, launch=replace(good.launch, divisible=()))
    monkeypatch.setattr(static, "selection", lambda arch: [good, bad])
    grouped = routed(layer("qwen3-30b-a3b", "down", "grouped"), SMALL)
    monkeypatch.setattr(static.expert_launches, "selection", lambda arch: [grouped])
    monkeypatch.setattr(static, "plain_cases", lambda arch: [plain(spec(4, 128), SMALL)])
    arguments = ["static", "--arch", "90", "--quick", "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--check"])
    with pytest.raises(SystemExit, match=f"{good.name}: .* copies of 16 bytes"):
        command.main()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    kinds = [row["kernel"].split()[0] for row in rows]
    assert kinds == ["gemm", "gemm", "grouped", "plain", "ideal", "ideal"]
    assert set(rows[0]) == set(static.HEADERS)
    assert rows[0]["issue"] > rows[0]["memory"] == H200.bandwidth / 1e12 > rows[3]["issue"]
    assert good.name in capsys.readouterr().out


def test_the_benchmarks_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench"])
    command.main()
    assert "python -m bench static" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bench", "statics"])
    with pytest.raises(SystemExit, match="'statics'"):
        command.main()

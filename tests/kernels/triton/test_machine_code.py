"""`bench.static.machine_code` sees in small kernels what they were made to have."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from bench.static import machine_code
from bench.static.machine_code import Launch, read, toolchain_missing
from fqcompile.kernels.spec import A100

MISSING = toolchain_missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
on_every_arch = pytest.mark.parametrize("arch", [80, 90])


@triton.jit
def _gemm(
    x_ptr, w_ptr, y_ptr, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WEIGHT_LEFT: tl.constexpr,
):  # fmt: skip
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if WEIGHT_LEFT else (BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        # [BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K]
        x = tl.load(x_ptr + offs_m[:, None] * K + offs_k[None, :])
        w = tl.load(w_ptr + offs_n[:, None] * K + offs_k[None, :]).to(x.dtype)
        acc = tl.dot(w, x.T, acc) if WEIGHT_LEFT else tl.dot(x, w.T, acc)
    if WEIGHT_LEFT:
        acc = acc.T
    y_ptrs = y_ptr + offs_m[:, None] * BLOCK_N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty))


@triton.jit
def _double(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) * 2)


@triton.jit
def _negate(x):
    return -x


@triton.jit
def _apply(x_ptr, bias_ptr, y_ptr, n, FUNCTION: tl.constexpr):
    offs = n + tl.arange(0, 128)
    y = FUNCTION(tl.load(x_ptr + offs))
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs)
    tl.store(y_ptr + offs, y)


def gemm(
    weight: str, m: int, n: int, k: int, left: bool, dtype: str = "bf16", **options: Any
) -> Launch:
    pointers = {"x_ptr": f"*{dtype}", "w_ptr": f"*{weight}", "y_ptr": f"*{dtype}"}
    constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "WEIGHT_LEFT": left}
    return Launch(_gemm, pointers, constants, **{"divisible": ("K",)} | options)


DOUBLE = Launch(_double, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"BLOCK": 1024})


@on_every_arch
def test_a_pipelined_product_copies_16_bytes_at_a_time(arch: int) -> None:
    code = read(gemm("bf16", 16, 64, 64, left=True), arch)
    assert (code.arch, code.num_warps, code.num_stages, code.has_loop) == (arch, 4, 3, True)
    # (16 + 64) * 64 values of 2 bytes, in 16 bytes for each of 128 threads
    assert (code.wide_async_copies, code.narrow_async_copies) == (5, 0)
    assert (code.wide_loads, code.narrow_loads, code.bulk_copies, code.shared_stores) == (0,) * 4
    assert (code.count("HMMA"), code.count("HGMMA")) == ((8, 0) if arch == 80 else (0, 4))
    assert code.matrix_products == (8 if arch == 80 else 4)
    assert code.count("@!PT LDS") > 0 == code.count("LDS")
    assert code.macs == 16 * 64 * 64
    assert code.unroll == 1
    assert code.shared_bytes >= 2 * (16 + 64) * 64 * 2
    assert code.spills == code.stack_bytes == code.local_bytes == code.int_to_float == 0
    assert 16 < code.registers < 128
    assert code.per_weight(64 * 64) == code.instructions / 32
    assert "wgmma" in code.ptx if arch == 90 else "mma.sync" in code.ptx
    assert "EXIT" in code.sass


@on_every_arch
def test_a_size_not_known_to_be_divisible_costs_the_wide_copies(arch: int) -> None:
    code = read(gemm("bf16", 16, 64, 64, left=True, divisible=()), arch)
    assert code.wide_async_copies == code.wide_loads == 0
    assert code.narrow_async_copies + code.narrow_loads > 5


def test_products_with_a_register_operand_are_told_from_shared_ones() -> None:
    converted = read(gemm("i8", 16, 64, 64, left=True), 90)
    assert converted.register_operand_products == converted.matrix_products == 4
    assert converted.shared_stores == 0
    copied = read(gemm("bf16", 16, 64, 64, left=True), 90)
    assert (copied.register_operand_products, copied.matrix_products) == (0, 4)


def test_a_converted_right_operand_makes_a_round_trip_through_shared_memory() -> None:
    code = read(gemm("i8", 64, 64, 64, left=False), 90)
    assert code.register_operand_products == 0
    assert code.shared_stores == 64 * 64 * 2 // (16 * 128)


def test_conversions_from_integers_are_counted() -> None:
    code = read(gemm("i8", 16, 64, 64, left=True), 80)
    # each of 128 threads converts its 32 of 64 * 64 weights
    assert code.int_to_float == code.count("I2F") == 32
    assert code.pipe_bound(64 * 64, A100) > code.issue_bound(64 * 64, A100)


def test_int32_weights_are_converted_on_the_integer_pipe() -> None:
    code = read(gemm("i32", 16, 64, 64, left=True, dtype="fp32"), 90)
    assert code.int_to_float == code.count("I2FP") == 32


@on_every_arch
def test_a_tile_too_big_for_one_warp_spills(arch: int) -> None:
    code = read(gemm("bf16", 64, 128, 32, left=False, num_warps=1, num_stages=2), arch)
    assert code.spills > 0
    assert code.stack_bytes + code.local_bytes > 0


def test_a_kernel_without_a_loop_counts_whole() -> None:
    code = read(DOUBLE, 90)
    assert not code.has_loop
    assert (code.wide_loads, code.narrow_loads) == (2, 0)
    assert code.count("STG", "EXIT") == 3
    assert code.count("BRA") == 0  # what only fills the last cache line is not reached
    with pytest.raises(ValueError, match="pass `unroll`"):
        code.per_weight(1024)
    assert code.per_weight(1024, unroll=1) == code.instructions / 8


def test_a_loop_that_ptxas_unrolled_is_known() -> None:
    code = read(gemm("bf16", 64, 64, 16, left=True, num_stages=1), 80)
    assert code.macs == 4 * 64 * 64 * 16
    assert code.unroll == 4
    assert code.per_weight(64 * 16) == code.instructions * 128 / (4 * 64 * 16)
    assert code.per_weight(64 * 16, unroll=1) == 4 * code.per_weight(64 * 16)


def test_warps_that_repeat_each_other_are_not_taken_for_unrolling() -> None:
    code = read(gemm("bf16", 16, 16, 32, left=True), 80)
    assert code.macs == 2 * 16 * 16 * 32
    assert code.unroll == 1
    code = read(gemm("bf16", 16, 64, 64, left=True, num_warps=8), 80)
    assert code.macs == 16 * 64 * 64
    assert code.unroll == 1


def test_functions_absent_pointers_and_wide_integers_can_be_given() -> None:
    pointers = {"x_ptr": "*fp32", "y_ptr": "*fp32", "bias_ptr": "*fp32"}
    launch = Launch(_apply, pointers, {"bias_ptr": None, "FUNCTION": _negate}, wide=("n",))
    assert ".param .u64 _apply_param_2" in read(launch, 80).ptx
    assert ".param .u32 _apply_param_2" in read(replace(launch, wide=()), 80).ptx


def test_a_register_limit_is_kept() -> None:
    launch = gemm("bf16", 64, 64, 64, left=True)
    assert read(launch, 80).registers > 64
    assert read(replace(launch, maxnreg=64), 80).registers <= 64


def test_a_launch_must_name_arguments_and_all_constants() -> None:
    with pytest.raises(ValueError, match=r"_double has no \['N'\]; it has \['x_ptr', 'y_ptr'"):
        read(replace(DOUBLE, divisible=("N",)), 80)
    with pytest.raises(ValueError, match=r"_double needs constants for \['BLOCK'\]"):
        read(replace(DOUBLE, constants={}), 80)


def test_tools_run_once_for_a_cubin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = []
    run = subprocess.run

    def spy(command: list[Any], **options: Any) -> Any:
        ran.append(Path(command[0]).name)
        return run(command, **options)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", spy)
    first = read(DOUBLE, 80)
    assert {"nvdisasm", "cuobjdump"} <= set(ran)
    ran.clear()
    assert read(DOUBLE, 80) == first
    assert ran == []
    assert read(DOUBLE, 90) != first
    assert {"nvdisasm", "cuobjdump"} <= set(ran)


def test_what_the_tools_complain_about_is_shown_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"nvdisasm -c failed: .*\w"):
            machine_code._inspect("nvdisasm", "-c", b"no cubin")


def test_a_missing_toolchain_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ptxas").touch()
    monkeypatch.setattr(machine_code, "TOOLS", tmp_path)
    assert toolchain_missing() == f"Triton came without cuobjdump, nvdisasm in {tmp_path}"
    monkeypatch.setattr(machine_code, "HAS_TRITON", False)
    assert toolchain_missing() == "Triton is not installed"

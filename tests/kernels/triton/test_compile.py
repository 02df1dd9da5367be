"""The kernels compile for real GPUs, without one, and keep everything in registers."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fqcompile.kernels.tile_config import TileConfig
from fqcompile.kernels.triton.dequant_gemm import (
    _dequant_gemm_kernel,
    _dequantize_kernel,
    closed_form_config,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
DIVISIBLE_BY_16 = ("N", "K", "stride_xm", "stride_rm", "row_bytes")

pytestmark = pytest.mark.skipif(not CUOBJDUMP.exists(), reason=f"Triton came without {CUOBJDUMP}")
on_every_arch = pytest.mark.parametrize("arch", [80, 90])


def compile_kernel(
    kernel: Any, arch: int, pointers: dict[str, str], constants: dict[str, Any], **options: int
) -> dict[str, Any]:
    """`ptx` and `cubin` for the usual launch: aligned pointers, sizes that 16 divides."""
    names = kernel.arg_names
    types = {name: pointers.get(name, "i32") for name in names}
    types |= dict.fromkeys(constants, "constexpr")
    hints = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name in DIVISIBLE_BY_16 or name in pointers
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=hints)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {stage: compiled.asm[stage] for stage in ("ptx", "cubin")}


def bytes_spilled(code: dict[str, Any], folder: Path) -> int:
    path = folder / "kernel.cubin"
    path.write_bytes(code["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    return int(found[2]) + int(found[3])


def compile_gemm(
    arch: int,
    bits: int,
    dtype: str,
    m: int,
    group_size: int,
    gated: bool = False,
    activation: str = "silu",
    config: TileConfig | None = None,
) -> dict[str, Any]:
    config = config or closed_form_config(m, 4096, 4096, bits, group_size, gated)
    names = ("x_ptr", "scale_ptr", "bias_ptr", "residual_ptr", "y_ptr")
    pointers = dict.fromkeys(names, f"*{dtype}") | {"q_ptr": "*u8" if bits == 4 else "*i8"}
    constants = {
        "BITS": bits,
        "GROUP_SIZE": group_size,
        "ACTIVATION": activation,
        "GATED": gated,
        "HAS_BIAS": True,
        "HAS_RESIDUAL": True,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return compile_kernel(_dequant_gemm_kernel, arch, pointers, constants, **options)


# Groups that K tiles fill, that they do not, and that begin inside a byte.
@pytest.mark.parametrize("group_size", [128, 48, 7])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("bits", [4, 8])
@on_every_arch
def test_gemm_compiles_without_spills(
    arch: int, bits: int, dtype: str, group_size: int, tmp_path: Path
) -> None:
    assert bytes_spilled(compile_gemm(arch, bits, dtype, 16, group_size), tmp_path) == 0


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("m", [64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@on_every_arch
def test_gemm_of_many_rows_compiles_without_spills(
    arch: int, bits: int, m: int, gated: bool, tmp_path: Path
) -> None:
    assert bytes_spilled(compile_gemm(arch, bits, "bf16", m, 4096, gated), tmp_path) == 0


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh"])
def test_every_activation_compiles(activation: str, tmp_path: Path) -> None:
    code = compile_gemm(90, 4, "fp16", 16, 64, activation=activation)
    assert bytes_spilled(code, tmp_path) == 0


def test_an_unknown_activation_does_not_compile() -> None:
    with pytest.raises(triton.CompilationError):
        compile_gemm(90, 4, "fp16", 16, 64, activation="tanhshrink")


@on_every_arch
def test_gemm_of_fp32_multiplies_in_fp32(arch: int, tmp_path: Path) -> None:
    code = compile_gemm(arch, 4, "fp32", 16, 64)
    assert "tf32" not in code["ptx"]
    assert bytes_spilled(code, tmp_path) == 0


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_gemm_multiplies_on_the_tensor_cores(dtype: str) -> None:
    assert "mma.sync" in compile_gemm(80, 4, dtype, 16, 64)["ptx"]
    assert "wgmma.mma_async" in compile_gemm(90, 4, dtype, 16, 64)["ptx"]


def test_a_kernel_too_big_for_the_registers_is_seen_to_spill(tmp_path: Path) -> None:
    config = TileConfig(128, 128, 64, num_warps=4)
    assert bytes_spilled(compile_gemm(80, 8, "fp16", 128, 64, config=config), tmp_path) > 0


@pytest.mark.parametrize("group_size", [128, 7])
@pytest.mark.parametrize("bits", [4, 8])
@on_every_arch
def test_dequantize_compiles_without_spills(
    arch: int, bits: int, group_size: int, tmp_path: Path
) -> None:
    pointers = {"q_ptr": "*u8" if bits == 4 else "*i8", "scale_ptr": "*bf16", "w_ptr": "*bf16"}
    constants = {"BITS": bits, "GROUP_SIZE": group_size, "BLOCK_N": 32, "BLOCK_K": 128}
    code = compile_kernel(_dequantize_kernel, arch, pointers, constants)
    assert bytes_spilled(code, tmp_path) == 0

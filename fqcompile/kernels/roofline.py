"""Roofline lower bounds of a matmul: bytes and FLOPs over the device's rates.

Expressions in M, the rows of x, in seconds. Each kernel's own cost model is next to the kernel.
"""

import time
from functools import cache
from typing import Protocol

import sympy
import torch
from sympy import Expr, Max, Symbol

from fqcompile.kernels.cpu.huge_pages import in_huge_pages
from fqcompile.kernels.spec import GemmSpec, Gpu

M: Symbol = Symbol("M", positive=True)
LAUNCH_SECONDS = 2e-6  # until a kernel's programs run at full rate, and the last of them ends
_FLOAT_BYTES = 2
_READ_BYTES = 128 << 20  # more than the caches of most processors
_READS = 4
_PLAIN_BITS = 16  # of a weight that is not quantized, and so has no scales


class Rates(Protocol):
    """Achievable rates of a device: bytes/s of its memory, flop/s of its matrix units."""

    @property
    def bandwidth(self) -> float: ...
    @property
    def matrix_flops(self) -> float: ...


def experts_hit(spec: GemmSpec) -> Expr:
    """Expected number of weights that M rows read if each row's expert is uniformly random."""
    if not spec.experts:
        return sympy.Integer(1)
    missed = sympy.Float(1 - 1 / spec.experts) ** M
    return spec.experts * (1 - missed)


def weight_bytes(spec: GemmSpec) -> int:
    """Bytes of codes and scales of one expert; with 16 bits, of the dense weights."""
    if spec.bits == _PLAIN_BITS:
        return spec.weight_rows * spec.k * _FLOAT_BYTES
    groups = -(-spec.k // min(spec.group_size, spec.k))
    scales = spec.weight_rows * groups * spec.scale_dtype.itemsize
    return spec.weight_rows * spec.k * spec.bits // 8 + scales


def activation_bytes(spec: GemmSpec) -> Expr:
    """Bytes of x, y and the residual, each moved once."""
    width = spec.dtype.itemsize
    return M * width * (spec.k + spec.n * (2 if spec.has_residual else 1))


def flops(spec: GemmSpec) -> Expr:
    """FLOPs: a multiplication and an addition for each row and weight."""
    return 2 * M * spec.weight_rows * spec.k


def ideal(spec: GemmSpec, rates: Rates, hit: Expr | None = None) -> Expr:
    """The larger of the time to move each byte once and the time of the product at cuBLAS's rate.

    `hit`: the number of experts that are read, if it is known better than from M.
    """
    read = experts_hit(spec) if hit is None else hit
    moved = (read * weight_bytes(spec) + activation_bytes(spec)) / rates.bandwidth
    return Max(moved, flops(spec) / rates.matrix_flops)


def ideal_seconds(spec: GemmSpec, m: int) -> float:
    """`ideal` for m rows on the spec's GPU."""
    assert spec.gpu is not None, "only a GPU has a roofline here"
    return float(ideal(spec, spec.gpu).subs(M, m))


def least_seconds(spec: GemmSpec) -> float | None:
    """Roofline lower bound for the spec's number of rows, on the device where it runs.

    On a CPU only memory traffic counts, at the measured bandwidth, which is tight for few rows.
    None if the device's rates are unknown.
    """
    if spec.gpu is not None:
        return ideal_seconds(spec, spec.m)
    if spec.device_type != "cpu":
        return None
    moved = experts_hit(spec) * weight_bytes(spec) + activation_bytes(spec)
    return float(moved.subs(M, spec.m)) / read_bandwidth()


def read_bandwidth() -> float:
    """Read bandwidth of PyTorch's threads in bytes/s; measured once, in 0.1 s."""
    return _measured(torch.get_num_threads())


@cache
def _measured(threads: int) -> float:
    """The best of a few sums, the fastest reader in PyTorch, over a tensor that no cache holds."""
    numbers = in_huge_pages(torch.empty(_READ_BYTES // 4)).fill_(1)
    seconds = []
    for _ in range(_READS):
        start = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - start)
    return _READ_BYTES / min(seconds)


def dense(spec: GemmSpec, gpu: Gpu) -> Expr:
    """Time to dequantize into scratch and multiply with cuBLAS; for experts, all of the stack."""
    stack = max(1, spec.experts)
    scratch = stack * spec.weight_rows * spec.k * _FLOAT_BYTES
    dequantize = (stack * weight_bytes(spec) + scratch) / gpu.bandwidth
    moved = (scratch + activation_bytes(spec)) / gpu.bandwidth
    return dequantize + Max(moved, flops(spec) / gpu.matrix_flops) + 2 * LAUNCH_SECONDS

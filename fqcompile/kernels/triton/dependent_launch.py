"""Programmatic dependent launch: a kernel starts while the one before it on the stream ends.

Launched with `launch_pdl`, a kernel may start as soon as every program of the kernel before it has
exited or called `gdc_launch_dependents`. `gdc_wait` blocks until that kernel is complete and its
writes are visible. Two rules make this right, and every kernel that we launch so keeps them:

1. Before the wait a program reads and writes no memory. It may ask L2 to prefetch its codes and
   scales: that returns no value, and later writes to device memory go through L2. So the kernel
   right before may be the one that packs a weight, or overwrites it in place.
2. Every program waits, also one that has nothing to do, and only then lets the next kernel start.

With P the kernel before ours, K ours and N the next one:

- P launched plainly starts when all before it is complete, and K touches memory when P is complete:
  the order is that of plain launches. K skips the time that its own launch takes.
- P one of ours: by rule 2 it is complete only after what was before it is, so K waits for that too,
  and so on down a chain of any length. Somebody else's kernel in P's place has to wait, as the PTX
  manual demands of each kernel that follows a launch_dependents; else a plain K were wrong as well.
- N launched plainly starts when K is complete. So do copies, events and other streams.
- N launched early may start at K's signal and has to wait, by the same sentence of the manual. By
  rule 2 all before K is complete then, so N may even read before its wait what is older than K.
  Inductor does that with `triton.enable_pdl`, but there a kernel that only fills memory never
  waits, and would overwrite what K still reads. Where that is configured, K is launched plainly.
- Launches that a CUDA graph captures become programmatic edges between its nodes, from CUDA 12.3
  on, with the same meaning. Where the operation before K is no kernel, K starts when it is done.

K takes no program's place in P: it starts when all programs of P have started.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

import ctypes
import logging
import os
from collections.abc import Mapping
from functools import cache

import torch
import triton
import triton.language as tl

from fqcompile.kernels.spec import Gpu, gpu_of
from fqcompile.options import switched_on
from fqcompile.torch_compat import inductor_config

log = logging.getLogger("fqcompile")
SWITCH = "FQCOMPILE_PDL"
LEAST_CAPABILITY = 90
_LEAST_DRIVER = 12030  # the first CUDA with programmatic edges in graphs
# The constant of the kernels, and the attribute of the launch.
EARLY = {"PDL": True, "launch_pdl": True}
_PLAIN: dict[str, bool] = {}


@triton.jit
def wait_for_earlier_kernels(PDL: tl.constexpr):
    """Stands before the first access to memory, and before any return. See rules 1 and 2."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(ptrs):
    """Ask L2 for the cache line of each pointer; the one thing that is allowed before the wait."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // dummy $0", "=r,l", [ptrs], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@cache
def early_launch(device: torch.device) -> Mapping[str, bool]:
    """What a launch on `device` says so that its kernel starts early: nothing, where it may not."""
    if device.type != "cuda":
        return _PLAIN
    refusal = refuse_early_launch(gpu_of(device))
    if refusal is None:
        return EARLY
    log.info("%s: kernels start when the one before is complete; early launch %s", device, refusal)
    return _PLAIN


def refuse_early_launch(gpu: Gpu) -> str | None:
    """Why kernels are launched plainly on this GPU; None if they start early.

    Raises:
        OptionError: the environment variable is neither on nor off.
    """
    wanted = switched_on(SWITCH, True)  # on any GPU, so that what it cannot say is told on all
    if gpu.capability < LEAST_CAPABILITY:
        return f"needs compute capability 9.0 or later; {gpu.name} has {gpu.arch}"
    if not wanted:
        return f"is off by {SWITCH}={os.environ[SWITCH]}"
    if inductor_config.triton.enable_pdl:
        return "is off because Inductor's triton.enable_pdl starts kernels that wait for nothing"
    if (version := _driver_version()) < _LEAST_DRIVER:
        return f"needs a driver for CUDA 12.3 or later; this one says {version} (12030 is 12.3)"
    return None


def _driver_version() -> int:
    """The newest CUDA that the driver supports, 12030 being 12.3; 0 if there is no driver."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value

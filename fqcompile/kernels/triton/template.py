"""The Triton family as templates: when it applies, its configurations, how it runs."""

import logging
from functools import partial
from math import ceil

import torch
from triton import CompilationError, OutOfResources
from triton.runtime.errors import PTXASError

from fqcompile.errors import KernelBuildError
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.spec import DENSE, Config, GemmSpec, TileConfig
from fqcompile.kernels.template import MOST_GATHERED, Layout, Routing, Template
from fqcompile.kernels.triton import layout
from fqcompile.kernels.triton.configs import (
    ANY_ROWS,
    candidates,
    launches,
    least_shared_bytes,
)
from fqcompile.kernels.triton.launch import (
    dense_experts,
    dense_gemm,
    dequant_gemm,
    dequantize,
    expert_gemm,
    sorted_by_expert,
)
from fqcompile.kernels.triton.target import kwidth as kwidth_of
from fqcompile.tensor.quantized import QuantizedTensor

log = logging.getLogger("fqcompile")
# What compiling or loading a kernel raises; a kernel that fails while it runs raises others.
_BUILD_ERRORS = (CompilationError, OutOfResources, PTXASError)
_MAY_BE_OF_THE_BUILD = (*_BUILD_ERRORS, RuntimeError)
_DTYPES = (torch.float16, torch.bfloat16)
_LEAST_GROUP = 16
# Per expert: offsets in words of 4 bytes, and in scales of 16 weights or more, have 31 bits.
_MOST_BYTES = 1 << 32


def _refuse(spec: GemmSpec, kwidth: int) -> str | None:
    if spec.device_type != "cuda":
        return f"runs on cuda, not {spec.device_type}"
    if spec.dtype not in _DTYPES:
        return f"takes fp16 or bf16 activations, not {spec.dtype}"
    if spec.group_size < spec.k and spec.group_size % _LEAST_GROUP:
        return f"takes groups of a multiple of {_LEAST_GROUP}, not {spec.group_size}"
    filled = (spec.weight_rows + layout.SCALE_ROWS) * (spec.k + layout.BLOCK_K)
    if filled * spec.bits // 8 >= _MOST_BYTES:
        size = f"{spec.weight_rows} x {spec.k}, filled up with {layout.SCALE_ROWS} rows,"
        return f"takes less than 4 GiB of codes; {size} are more"
    if spec.gpu is None:
        return "no GPU is known to tune for"
    if 0 < spec.gpu.capability < 80:
        return f"needs compute capability 8.0 or later; {spec.gpu.name} has {spec.gpu.arch}"
    if kwidth_of(spec.gpu) != kwidth:
        return f"packs for another matrix instruction than that of {spec.gpu.arch}"
    if (needed := ceil(least_shared_bytes(spec))) > spec.gpu.shared_bytes:
        has = f"{spec.gpu.name} has {spec.gpu.shared_bytes}"
        return f"needs {needed} bytes of shared memory for each program; {has}"
    return None


def _run(
    x: torch.Tensor,
    weight: QuantizedTensor,
    routing: Routing | None,
    epilogue: Epilogue,
    config: Config | None,
    kwidth: int,
) -> torch.Tensor:
    try:
        if routing is not None:
            return _run_experts(x, weight, routing, epilogue, config, kwidth)
        return _run_one(x, weight, epilogue, config, kwidth)
    except _MAY_BE_OF_THE_BUILD as error:
        if not _is_of_the_build(error):
            raise
        raise KernelBuildError(f"{type(error).__name__}: {error}") from error


def _run_one(
    x: torch.Tensor,
    weight: QuantizedTensor,
    epilogue: Epilogue,
    config: Config | None,
    kwidth: int,
) -> torch.Tensor:
    if config is None or config is DENSE:
        try:
            return dense_gemm(x, weight, epilogue, kwidth)
        except torch.OutOfMemoryError as error:
            config = _without_scratch(error)
    return dequant_gemm(x, weight, epilogue, config, kwidth)


def _run_experts(
    x: torch.Tensor,
    weight: QuantizedTensor,
    routing: Routing,
    epilogue: Epilogue,
    config: Config | None,
    kwidth: int,
) -> torch.Tensor:
    experts = weight.qweight.shape[0]
    if routing.ids is not None and x.shape[0] > MOST_GATHERED * experts:
        order, by_expert, unknown = sorted_by_expert(routing.ids, experts)
        ordered = _run_experts(x[order], weight, by_expert, epilogue, config, kwidth)
        y = torch.empty_like(ordered).index_copy_(0, order, ordered)
        return y.masked_fill_(unknown.unsqueeze(1), torch.nan)
    if config is DENSE:
        if routing.offsets is None:
            raise KernelBuildError("dense experts take rows that are grouped, not gathered")
        try:
            return dense_experts(x, weight, routing.offsets, epilogue, kwidth)
        except torch.OutOfMemoryError as error:
            config = _without_scratch(error)
    return expert_gemm(x, weight, routing, epilogue, config or ANY_ROWS, kwidth)


def _without_scratch(error: torch.OutOfMemoryError) -> TileConfig:
    log.warning("no memory for a dequantized weight: its codes are read instead; %s", error)
    return ANY_ROWS


def _is_of_the_build(error: Exception) -> bool:
    """Whether a build failed: some failures are a RuntimeError that only its text tells apart."""
    if isinstance(error, _BUILD_ERRORS):
        return True
    text = str(error)
    return "PassManager::run failed" in text or "device kernel image is invalid" in text


def _dequantize(weight: QuantizedTensor, dtype: torch.dtype, kwidth: int) -> torch.Tensor:
    try:
        return dequantize(weight, dtype, kwidth)
    except _BUILD_ERRORS as error:
        raise KernelBuildError(f"{type(error).__name__}: {error}") from error


def _family(name: str, kwidth: int) -> Template:
    fragments = Layout(
        f"fragment{kwidth}_v{layout.VERSION}",
        partial(layout.pack, kwidth=kwidth),
        layout.shapes,
        partial(_dequantize, kwidth=kwidth),
        partial(layout.unpack, kwidth=kwidth),
        layout.narrow,
        partial(layout.gather, kwidth=kwidth),
    )
    return Template(
        name,
        fragments,
        partial(_refuse, kwidth=kwidth),
        launches,
        partial(_run, kwidth=kwidth),
        candidates,
    )


TRITON_GEMM = _family("triton_gemm", 2)
TRITON_GEMM_KW4 = _family("triton_gemm_kw4", 4)
TRITON_GEMMS = (TRITON_GEMM, TRITON_GEMM_KW4)

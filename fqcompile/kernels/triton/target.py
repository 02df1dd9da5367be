"""What depends on the GPU: the operand order of its matrix instruction, and a safe conversion."""

# mypy: allow-incomplete-defs, allow-untyped-defs

import logging

import torch
import triton
import triton.language as tl

from fqcompile.kernels.spec import Gpu
from fqcompile.kernels.triton.conversion import code_factor
from fqcompile.kernels.triton.fragments import operand

log = logging.getLogger("fqcompile")
_CONVERSIONS: dict[tuple[torch.device, torch.dtype], str] = {}
_TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


def kwidth(gpu: Gpu) -> int:
    """The order of the packed codes: 2, or 4 for the layout of mma.sync in Triton before 3.8."""
    has_wgmma = 90 <= gpu.capability < 120  # or its successor; later consumer GPUs have neither
    return 4 if _TRITON < (3, 8) and gpu.capability and not has_wgmma else 2


@triton.jit
def _probe_kernel(words_ptr, out_ptr, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """out [64, 64] fp32 = the codes of words [64, 4, 4] through the matrix units."""
    CHUNKS: tl.constexpr = 64 * BITS // 128
    offs = tl.arange(0, 64)
    offs_w = tl.arange(0, 4 * CHUNKS)
    words = tl.load(words_ptr + offs[:, None] * (4 * CHUNKS) + offs_w[None, :])
    words = tl.reshape(words, (64, 4, CHUNKS))
    identity = (offs[:, None] == offs[None, :]).to(DTYPE)
    w = operand(words, 64, BITS, "uniform", 2, DTYPE, "subnormal")
    FACTOR: tl.constexpr = code_factor(DTYPE, "uniform", "subnormal")
    tl.store(out_ptr + offs[:, None] * 64 + offs[None, :], tl.dot(w, identity) * FACTOR)


def keeps_subnormals(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether every int4 and int8 code comes out of this GPU's matrix units exactly."""
    tl_dtype = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
    for bits in (4, 8):
        per_word, words = 32 // bits, 2 * bits
        values = torch.arange(64 * words * per_word, device=device) % (1 << bits)
        shifts = bits * torch.arange(per_word, device=device)
        packed = (values.view(64, words, per_word) << shifts).sum(-1).to(torch.int32)
        out = torch.empty(64, 64, device=device)
        with torch.cuda.device_of(packed):
            _probe_kernel[(1,)](packed, out, tl_dtype, bits)
        expected = values.view(64, 64).sort().values - (1 << (bits - 1))
        if not torch.equal(out.sort().values.long(), expected):
            return False
    return True


def conversion(device: torch.device, dtype: torch.dtype) -> str:
    """The method by which `fragments` converts codes: all give equal values, at different speeds.

    It is probed on the first call. During the capture of a CUDA graph, which forbids that, the
    method is the one that works everywhere, "exponent".
    """
    known = _CONVERSIONS.get((device, dtype))
    if known is not None:
        return known
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "exponent"
    return _CONVERSIONS.setdefault((device, dtype), _probed(device, dtype))


def _probed(device: torch.device, dtype: torch.dtype) -> str:
    if not keeps_subnormals(device, dtype):
        log.info("%s flushes subnormal numbers: codes are converted by their exponent", device)
        return "exponent"
    return "subnormal" if torch.version.hip else "subnormal_prmt"

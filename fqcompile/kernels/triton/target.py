"""What depends on the GPU: the operand order of its matrix instruction, and a safe conversion."""

# mypy: allow-incomplete-defs, allow-untyped-defs

import logging

import torch
import triton
import triton.language as tl

from fqcompile.kernels.spec import Gpu
from fqcompile.kernels.triton.conversion import code_factor
from fqcompile.kernels.triton.fragments import operand
from fqcompile.tensor.format import QTYPES

log = logging.getLogger("fqcompile")
_CONVERSIONS: dict[tuple[torch.device, torch.dtype], str] = {}
_TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


def kwidth(gpu: Gpu) -> int:
    """The order of the packed codes: 2, or 4 for the layout of mma.sync in Triton before 3.8."""
    return 4 if _TRITON < (3, 8) and gpu.capability and not gpu.has_wgmma else 2


@triton.jit
def _probe_kernel(
    words_ptr, out_ptr, DTYPE: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr
):
    """out [64, 64] fp32 = the levels of words [64, 4, 2 or 4] through the matrix units."""
    CHUNKS: tl.constexpr = 64 * BITS // 128
    offs = tl.arange(0, 64)
    offs_w = tl.arange(0, 4 * CHUNKS)
    words = tl.load(words_ptr + offs[:, None] * (4 * CHUNKS) + offs_w[None, :])
    words = tl.reshape(words, (64, 4, CHUNKS))
    identity = (offs[:, None] == offs[None, :]).to(DTYPE)
    w = operand(words, 64, BITS, LEVELS, 2, DTYPE, "subnormal")
    FACTOR: tl.constexpr = code_factor(DTYPE, LEVELS, "subnormal")
    tl.store(out_ptr + offs[:, None] * 64 + offs[None, :], tl.dot(w, identity) * FACTOR)


def keeps_subnormals(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether every level of every format comes out of this GPU's matrix units exactly."""
    tl_dtype = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
    for qtype in QTYPES.values():
        # All codes of a word are equal: then each is as often there, however its bits are placed.
        bits, codes = qtype.bits, len(qtype.values)
        words = torch.arange(64 * 2 * bits, device=device) % codes * (0xFFFFFFFF // (codes - 1))
        out = torch.empty(64, 64, device=device)
        with torch.cuda.device_of(words):
            _probe_kernel[(1,)](words.to(torch.int32), out, tl_dtype, bits, qtype.levels)
        expected = torch.tensor(qtype.values, device=device).repeat_interleave(64 * 64 // codes)
        if not torch.equal(out.flatten().sort().values, expected):
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

"""The pieces that kernels share: the codes of a weight tile, and the activations.

A plain int4 row holds two codes a byte, q + 8 each, the even column in the low nibble; an int8 row
holds one code a byte.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def load_codes(
    q_ptr,
    row_bytes,
    offs_n,
    mask_n,
    k0,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """int8 codes [BLOCK_N, BLOCK_K] from column k0 on, which is even for int4.

    Past the end of a row and in masked rows they are arbitrary: the caller masks what meets them.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    offs_b = k0 // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE)
    ptrs = q_ptr + offs_n.to(tl.int64)[:, None] * row_bytes + offs_b[None, :]
    # [BLOCK_N, BLOCK_K // PER_BYTE]
    packed = tl.load(ptrs, mask=mask_n[:, None] & (offs_b < row_bytes)[None, :], other=0)
    if BITS == 4:
        nibbles = tl.join(packed & 15, packed >> 4)
        codes = tl.reshape(nibbles, (BLOCK_N, BLOCK_K)).to(tl.int8) - 8
    else:
        codes = packed
    return codes


@triton.jit
def apply_activation(z, ACTIVATION: tl.constexpr):
    """The activation of that name (`fqcompile.kernels.epilogue.ACTIVATIONS`), in fp32."""
    y = z
    if ACTIVATION == "relu":
        # `tl.maximum` would turn NaN into 0.
        y = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "gelu":
        y = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u), with u = sqrt(2 / pi) * (z + 0.044715 z^3).
        y = z * tl.sigmoid(1.5957691216057308 * tl.fma(0.044715 * z * z, z, z))
    elif ACTIVATION == "silu":
        y = z * tl.sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "none", "this activation has no Triton form")
    return y

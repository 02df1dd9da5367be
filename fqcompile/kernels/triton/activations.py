"""The Triton forms of the table `fqcompile.kernels.epilogue.ACTIVATIONS`: fp32 in, fp32 out."""

# mypy: allow-incomplete-defs, allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def none(z):
    return z


@triton.jit
def relu(z):
    # `tl.maximum` would turn NaN into 0.
    return tl.where(z < 0.0, 0.0, z)


@triton.jit
def gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_tanh(z):
    # (1 + tanh(u)) / 2 = sigmoid(2u), with u = sqrt(2 / pi) * (z + 0.044715 z^3).
    return z * tl.sigmoid(1.5957691216057308 * tl.fma(0.044715 * z * z, z, z))


@triton.jit
def silu(z):
    return z * tl.sigmoid(z)


@triton.jit
def swiglu_oai(z):
    # `tl.minimum` would turn NaN into 7.
    z = tl.where(z > 7.0, 7.0, z)
    return z * tl.sigmoid(1.702 * z)


@triton.jit
def swiglu_oai_up(z):
    z = tl.where(z > 7.0, 7.0, z)
    return tl.where(z < -7.0, -7.0, z) + 1.0

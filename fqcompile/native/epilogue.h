// Activations on vectors of fp32.
#pragma once
#include "vectors.h"

// e^x: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; within 2 units of the last place. Clamped, so
// that 2^n is a normal number, or above e^88.37 infinity: below e^-87 the result is that, not zero.
INLINE F32 exponential(F32 x) {
  x = least(splat(89.0f), most(splat(-87.0f), x));  // a NaN as second operand is handed on
  const F32 n = nearest(multiply(x, splat(1.44269504f)));
  const F32 r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  F32 p = splat(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f, 1.0f, 1.0f})
    p = fma(p, r, splat(c));
  return multiply(p, as_float(left(add_bits(to_int(n), splat_bits(127)), 23)));
}

// z / (1 + e^(-a z))
INLINE F32 swish(F32 z, float a) {
  return divide(z, add(splat(1.0f), exponential(multiply(z, splat(-a)))));
}

// z/2 erfc(-z / sqrt 2). erfc as in Numerical Recipes: t e^(-x^2 + polynomial in t), t = 1 / (1 + x/2),
// within 1.2e-7 of itself for x >= 0; below zero erfc(x) = 2 - erfc(-x).
INLINE F32 gelu(F32 z) {
  const F32 size = as_float(and_bits(as_bits(z), splat_bits(0x7fffffff)));
  const F32 x = multiply(size, splat(0.70710678f));
  const F32 t = divide(splat(1.0f), fma(x, splat(0.5f), splat(1.0f)));
  F32 p = splat(0.17087277f);
  for (const float c : {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f,
                        0.37409196f, 1.00002368f, -1.26551223f})
    p = fma(p, t, splat(c));
  const F32 erfc = multiply(t, exponential(fma(x, multiply(x, splat(-1.0f)), p)));
  return fma(multiply(size, splat(-0.5f)), erfc, most(zero(), z));
}

INLINE F32 activate(F32 z, Activation name) {
  switch (name) {
    case NONE: return z;
    case RELU: return most(zero(), z);  // a NaN is handed on: it is the second operand
    case GELU: return gelu(z);
    // z/2 (1 + tanh u) = z sigmoid(2u), u = sqrt(2/pi) (z + 0.044715 z^3)
    case GELU_TANH: {
      const F32 inner = fma(multiply(z, z), splat(0.044715f * 1.59576912f), splat(1.59576912f));
      return divide(z, add(splat(1.0f), exponential(multiply(multiply(z, inner), splat(-1.0f)))));
    }
    case SILU: return swish(z, 1.0f);
    case SWIGLU_OAI: return swish(least(splat(7.0f), z), 1.702f);
  }
  return z;
}

// What a gated layer's other half is before the product.
INLINE F32 other_half(F32 z, Activation name) {
  return name == SWIGLU_OAI ? add(least(splat(7.0f), most(splat(-7.0f), z)), splat(1.0f)) : z;
}

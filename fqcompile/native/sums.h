// Sums by halves, the first of which is the larger power of two: as `halving_sum` in tensor/chunks.py
// adds them, bit for bit.
#pragma once
#include <algorithm>

#include "vectors.h"

static inline int64_t first_half(int64_t count) {
  int64_t half = 1;
  while (2 * half < count) half *= 2;
  return half;
}

static inline int64_t power_of_two_from(int64_t count) { return count > 8 ? 2 * first_half(count) : 8; }

// By halves, the first of which is the larger power of two; x is lost.
static inline float halving_sum(float* x, int64_t count) {
  for (int64_t half = first_half(count); half >= LANES; half /= 2) {
    const int64_t second = std::min(count - half, half);
    for (int64_t i = 0; i < second; i += LANES)
      store(x + i, add(load(x + i), load_some(x + half, FP32, i, second - i)));
    count = half;
  }
  return sum_of_lanes(load_some(x, FP32, 0, count));
}

template <class T>
static inline T halving_sum(T* x, int64_t count, int64_t width = 1) {
  for (int64_t half = first_half(count); half >= 1; half /= 2) {
    const int64_t second = std::min(count - half, half) * width;
    for (int64_t i = 0; i < second; i++) x[i] += x[i + half * width];
    count = half;
  }
  return x[0];
}

// The sum of term(0) ... term(count - 1) by halves; `partial` has room for an eighth of them. Terms from
// there to the next power of two are zero.
template <class Term>
static inline double halving_sum_of(int64_t count, double* partial, const Term& term) {
  const int64_t e = power_of_two_from(count) / 8;
  for (int64_t i = 0; i < e; i++)
    partial[i] = ((term(i) + term(i + 4 * e)) + (term(i + 2 * e) + term(i + 6 * e))) +
                 ((term(i + e) + term(i + 5 * e)) + (term(i + 3 * e) + term(i + 7 * e)));
  return halving_sum(partial, e, 1);
}

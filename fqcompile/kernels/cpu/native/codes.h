// How codes lie in the 32-bit words of the packed weight, and the two ways to multiply by them.
//
// A word belongs to one output and holds WORD = 32 / BITS neighboring codes of its row, as two's
// complement: of each pair (k, k + 1) the first in the lower 16 bits, the second in the upper, so that
// both ways read the same words. Code i is at bit 16 * (i odd) + BITS * (i / 2).
#pragma once
#include "vectors.h"

template <int BITS>
struct Codes {
  static constexpr int WORD = 32 / BITS;
  static constexpr int bit(int i) { return 16 * (i & 1) + BITS * (i >> 1); }
  // Code i of each word, as a float.
  INLINE F32 at(U32 words, int i) {
#if defined(__AVX512F__)
    if (BITS == 4) {  // the look-up reads the lowest four bits alone
      const F32 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
      return _mm512_permutexvar_ps(right(words, bit(i)), table);
    }
#endif
    return from_int(right_signed(left(words, 32 - BITS - bit(i)), 32 - BITS));
  }
};

// fp32: a multiplication and an addition a code, x as fp32. Exact products, fp32 sums.
template <int BITS_>
struct Single {
  static constexpr int BITS = BITS_, WORD = 32 / BITS, UNITS = WORD, PER_UNIT = 1;
  static constexpr int x_of(int unit) { return unit; }
  INLINE F32 unit(U32 words, int i) { return Codes<BITS>::at(words, i); }
  INLINE F32 mac(F32 sum, F32 code, uint32_t x) { return fma(code, as_float(splat_bits(x)), sum); }
};

#if defined(__AVX512BF16__)
// The four bits at 4 * i of both halves of each word, looked up as bf16. The look-up reads the lowest
// five bits of a half; the table repeats, so that the fifth does not matter.
struct Table {
  alignas(64) uint16_t bf16[32];
  constexpr Table(int low, int high, int factor) : bf16{} {
    for (int i = 0; i < 32; i++) {
      const int code = i % 16 < 8 ? i % 16 + low : i % 16 + high;
      bf16[i] = uint16_t(__builtin_bit_cast(uint32_t, float(code * factor)) >> 16);
    }
  }
};
constexpr Table SIGNED(0, -16, 1), SIGNED_TIMES_16(0, -16, 16), UNSIGNED(0, 0, 1);

INLINE U32 look_up(U32 words, int i, const Table& table) {
  return _mm512_permutexvar_epi16(right(words, 4 * i), load_words(table.bf16));
}

// bf16: both codes of a pair at once, x as pairs of bf16. Codes are exact in bf16, products in fp32.
template <int BITS_>
struct Paired {
  static constexpr int BITS = BITS_, WORD = 32 / BITS, UNITS = WORD / 2, PER_UNIT = 2;
  static constexpr int x_of(int unit) { return unit; }
  INLINE U32 unit(U32 words, int i) {
    if (BITS == 4) return look_up(words, i, SIGNED);
    // Integers up to 256 have zeros in the lower half of their fp32.
    const U32 first = as_bits(Codes<BITS>::at(words, 2 * i));
    const U32 second = as_bits(Codes<BITS>::at(words, 2 * i + 1));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, right(first, 16), second);
  }
  INLINE F32 mac(F32 sum, U32 pair, uint32_t x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)pair, (__m512bh)splat_bits(x));
  }
};

// int8 as 16 * (upper four bits) + lower four bits: twice the products, but few instructions to get at
// them. Faster while the instructions that widen a code serve one row or two.
struct Halved {
  static constexpr int BITS = 8, WORD = 4, UNITS = 4, PER_UNIT = 2;
  static constexpr int x_of(int unit) { return unit / 2; }
  INLINE U32 unit(U32 words, int i) { return look_up(words, i, i % 2 ? SIGNED_TIMES_16 : UNSIGNED); }
  INLINE F32 mac(F32 sum, U32 pair, uint32_t x) { return Paired<8>::mac(sum, pair, x); }
};
#endif

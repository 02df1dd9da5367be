// How codes lie in the 32-bit words of the packed weight, and the two ways to multiply by them.
//
// A word belongs to one output and holds WORD = 32 / BITS neighboring codes of its row, as two's
// complement: of each pair (k, k + 1) the first in the lower 16 bits, the second in the upper, so that
// both ways read the same words. Code i is at bit 16 * (i odd) + BITS * (i / 2).
#pragma once
#include "vectors.h"

// The values of int4 codes: of each four bits, and as bf16, where the look-up reads the lowest five bits
// of a half; the table repeats, so that the fifth does not matter.
struct Levels {
  alignas(64) float fp32[16];
  alignas(64) uint16_t bf16[32];
  alignas(16) int8_t sixteenths[16];
  bool integers;  // each code is its own value

  // `values` are those of the codes -8 to 7, sixteenths of integers from -128 to 127, so that they are exact
  // in bf16; null where codes are their own values.
  explicit Levels(const float* values) : integers(!values) {
    for (int i = 0; i < 32; i++) {
      const int code = i % 16 < 8 ? i % 16 : i % 16 - 16;
      const float value = values ? values[code + 8] : float(code);
      fp32[i % 16] = value;
      sixteenths[i % 16] = int8_t(16 * value);
      bf16[i] = uint16_t(__builtin_bit_cast(uint32_t, value) >> 16);
    }
  }
};

// LOOKED_UP: the values of int4 codes are found in a table, else codes are integers. With AVX-512 a
// look-up costs less than making an integer of four bits, with AVX2 more.
template <int BITS, bool LOOKED_UP>
struct Codes {
  static constexpr int WORD = 32 / BITS;
  static constexpr float UNIT = 1;
  static constexpr int bit(int i) { return 16 * (i & 1) + BITS * (i >> 1); }
  explicit Codes(const Levels&) {}

  // The value of code i of each word, in UNITs.
  INLINE_MEMBER F32 at(U32 words, int i) const {
    return from_int(right_signed(left(words, 32 - BITS - bit(i)), 32 - BITS));
  }
};

template <>
struct Codes<4, true> {
  static constexpr int WORD = 8;
  static constexpr int bit(int i) { return Codes<4, false>::bit(i); }
#if defined(__AVX512F__)
  // One shift brings both codes of a pair to the lowest bits of their halves; looked up as bf16, the second
  // is an fp32 whose lower half is zero.
  static constexpr float UNIT = 1;
  F32 table;
  U32 table_of_halves;
  explicit Codes(const Levels& levels) : table(load(levels.fp32)), table_of_halves(load_words(levels.bf16)) {}
  INLINE_MEMBER F32 at(U32 words, int i) const {
    const U32 pair = right(words, bit(i & ~1));
    return i & 1 ? as_float(look_up_upper_halves(pair, table_of_halves)) : look_up(pair, table, table);
  }
#else
  // Four codes of each word are looked up at a time, as bytes, and each is moved to the top of its word: no
  // second shift has to bring its sign down.
  static constexpr float UNIT = 1.0f / (16 << 24);
  U32 table;
  explicit Codes(const Levels& levels) : table(twice(levels.sixteenths)) {}
  INLINE_MEMBER F32 at(U32 words, int i) const {
    const U32 codes = and_bits(bit(i) % 8 ? right(words, 4) : words, splat_bits(0x0f0f0f0f));
    return from_int(byte_at_top(look_up_bytes(codes, table), bit(i) / 8));
  }
#endif
};

// fp32: a multiplication and an addition a code, x as fp32. Exact products, fp32 sums.
template <int BITS_, bool LOOKED_UP>
struct Single : Codes<BITS_, LOOKED_UP> {
  static constexpr int BITS = BITS_, WORD = 32 / BITS, UNITS = WORD, PER_UNIT = 1;
  static constexpr bool BY_FOURS = BITS == 4 && LOOKED_UP && LANES == 8;
  using Codes<BITS, LOOKED_UP>::Codes;
  // Codes that are looked up together (0, 1, 4, 5) follow one another: there are few registers.
  static constexpr int x_of(int unit) {
    return BY_FOURS ? (unit & 1) | (unit & 2) << 1 | (unit & 4) >> 1 : unit;
  }
  INLINE_MEMBER F32 unit(U32 words, int i) const { return this->at(words, x_of(i)); }
  INLINE F32 mac(F32 sum, F32 code, uint32_t x) { return fma(code, as_float(splat_bits(x)), sum); }
};

#if defined(__AVX512BF16__)
// The four bits at 4 * i of both halves of each word, looked up as bf16.
INLINE U32 look_up_halves(U32 words, int i, U32 table) {
  return _mm512_permutexvar_epi16(right(words, 4 * i), table);
}

// int4 in bf16: both codes of a pair at once, x as pairs of bf16. Values are exact in bf16, products in
// fp32.
struct PairedNibbles {
  static constexpr int BITS = 4, WORD = 8, UNITS = 4, PER_UNIT = 2;
  static constexpr float UNIT = 1;
  U32 table;
  explicit PairedNibbles(const Levels& levels) : table(load_words(levels.bf16)) {}
  static constexpr int x_of(int unit) { return unit; }
  INLINE_MEMBER U32 unit(U32 words, int i) const { return look_up_halves(words, i, table); }
  INLINE F32 mac(F32 sum, U32 pair, uint32_t x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)pair, (__m512bh)splat_bits(x));
  }
};

// int8 in bf16, likewise. Integers up to 256 have zeros in the lower half of their fp32.
struct PairedBytes : Codes<8, false> {
  static constexpr int BITS = 8, UNITS = 2, PER_UNIT = 2;
  using Codes::Codes;
  static constexpr int x_of(int unit) { return unit; }
  INLINE_MEMBER U32 unit(U32 words, int i) const {
    const U32 first = as_bits(at(words, 2 * i)), second = as_bits(at(words, 2 * i + 1));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, right(first, 16), second);
  }
  INLINE F32 mac(F32 sum, U32 pair, uint32_t x) { return PairedNibbles::mac(sum, pair, x); }
};

// int8 as 16 * (upper four bits) + lower four bits: twice the products, but few instructions to get at
// them. Faster while the instructions that widen a code serve one row or two.
struct Halved {
  static constexpr int BITS = 8, WORD = 4, UNITS = 4, PER_UNIT = 2;
  static constexpr float UNIT = 1;
  U32 upper, lower;
  explicit Halved(const Levels&) {
    alignas(64) uint16_t bf16[2][32];
    for (int i = 0; i < 32; i++) {
      const int low = i % 16, high = low < 8 ? low : low - 16;
      bf16[0][i] = uint16_t(__builtin_bit_cast(uint32_t, float(16 * high)) >> 16);
      bf16[1][i] = uint16_t(__builtin_bit_cast(uint32_t, float(low)) >> 16);
    }
    upper = load_words(bf16[0]);
    lower = load_words(bf16[1]);
  }
  static constexpr int x_of(int unit) { return unit / 2; }
  INLINE_MEMBER U32 unit(U32 words, int i) const { return look_up_halves(words, i, i % 2 ? upper : lower); }
  INLINE F32 mac(F32 sum, U32 pair, uint32_t x) { return PairedNibbles::mac(sum, pair, x); }
};
#endif

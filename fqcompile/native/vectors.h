// Vector registers of the instruction set that this is compiled for: 16 lanes with AVX-512, 8 with
// AVX2. A lane is one output (row of the weight); nothing above this file knows the width.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "types.h"

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

// Four bytes of x, wherever they lie: an fp32 or two bf16.
typedef uint32_t Bits __attribute__((aligned(1), may_alias));

#if defined(__AVX512F__)
constexpr int LANES = 16;
using F32 = __m512;
using U32 = __m512i;
INLINE F32 zero() { return _mm512_setzero_ps(); }
INLINE F32 splat(float x) { return _mm512_set1_ps(x); }
INLINE F32 load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
INLINE F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
INLINE F32 subtract(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
INLINE F32 multiply(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F32 divide(F32 a, F32 b) { return _mm512_div_ps(a, b); }
INLINE F32 least(F32 a, F32 b) { return _mm512_min_ps(a, b); }
INLINE F32 most(F32 a, F32 b) { return _mm512_max_ps(a, b); }
INLINE F32 nearest(F32 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
INLINE F32 as_float(U32 v) { return _mm512_castsi512_ps(v); }
INLINE U32 as_bits(F32 v) { return _mm512_castps_si512(v); }
INLINE U32 load_words(const void* p) { return _mm512_loadu_si512(p); }
INLINE U32 splat_bits(uint32_t x) { return _mm512_set1_epi32((int)x); }
INLINE U32 add_bits(U32 a, U32 b) { return _mm512_add_epi32(a, b); }
INLINE U32 and_bits(U32 a, U32 b) { return _mm512_and_si512(a, b); }
INLINE U32 left(U32 v, int n) { return _mm512_slli_epi32(v, (unsigned)n); }
INLINE U32 right(U32 v, int n) { return _mm512_srli_epi32(v, (unsigned)n); }
INLINE U32 right_signed(U32 v, int n) { return _mm512_srai_epi32(v, (unsigned)n); }
INLINE F32 from_int(U32 v) { return _mm512_cvtepi32_ps(v); }
INLINE U32 to_int(F32 v) { return _mm512_cvtps_epi32(v); }
INLINE U32 truncated(F32 v) { return _mm512_cvttps_epi32(v); }
INLINE U32 clamped(U32 v, int low, int high) {
  return _mm512_min_epi32(_mm512_max_epi32(v, splat_bits((uint32_t)low)), splat_bits((uint32_t)high));
}
// v + bits where a >= b, else v.
INLINE U32 add_where_least(F32 a, F32 b, U32 v, U32 bits) {
  return _mm512_mask_add_epi32(v, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), v, bits);
}
// v where test > 0, else 0.
INLINE F32 where_positive(F32 test, F32 v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(test, zero(), _CMP_GT_OQ), v);
}
INLINE float least_lane(F32 v) { return _mm512_reduce_min_ps(v); }
INLINE float most_lane(F32 v) { return _mm512_reduce_max_ps(v); }
// By halves: lane i and lane i + 8, then + 4, + 2, + 1.
INLINE float sum_of_lanes(F32 v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// Lane i is the sum of v[i]'s lanes.
INLINE F32 sums_of_each(const F32 (&v)[LANES]) {
  F32 two[8], four[4];
  for (int i = 0; i < 8; i++)
    two[i] = add(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
    four[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto halves = [](F32 a, F32 b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return halves(halves(four[0], four[1]), halves(four[2], four[3]));
}
INLINE uint32_t equal_lanes(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
INLINE void store_bytes(uint8_t* p, U32 v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v)); }
// Entry v & 15 of the 16 that `low` holds; with 8 lanes `high` holds the last 8 of them.
INLINE F32 look_up(U32 v, F32 low, F32) { return _mm512_permutexvar_ps(v, low); }
// Of each word: entry (v >> 16) & 31 of the 32 halves in the table, above 16 zeros.
INLINE U32 look_up_upper_halves(U32 v, U32 table) {
  return _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, v, table);
}
INLINE F32 where_nan(F32 test, F32 yes, F32 no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(test, test, _CMP_UNORD_Q), no, yes);
}
INLINE bool any_nan(F32 v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }
INLINE U32 load_half(const uint16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
INLINE void store_half(uint16_t* p, U32 v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(v));
}
INLINE F32 load_fp16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
INLINE void store_fp16(uint16_t* p, F32 v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
constexpr int LANES = 8;
using F32 = __m256;
using U32 = __m256i;
INLINE F32 zero() { return _mm256_setzero_ps(); }
INLINE F32 splat(float x) { return _mm256_set1_ps(x); }
INLINE F32 load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, F32 v) { _mm256_storeu_ps(p, v); }
INLINE F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
INLINE F32 subtract(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
INLINE F32 multiply(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
INLINE F32 divide(F32 a, F32 b) { return _mm256_div_ps(a, b); }
INLINE F32 least(F32 a, F32 b) { return _mm256_min_ps(a, b); }
INLINE F32 most(F32 a, F32 b) { return _mm256_max_ps(a, b); }
INLINE F32 nearest(F32 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT); }
INLINE F32 as_float(U32 v) { return _mm256_castsi256_ps(v); }
INLINE U32 as_bits(F32 v) { return _mm256_castps_si256(v); }
INLINE U32 load_words(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE U32 splat_bits(uint32_t x) { return _mm256_set1_epi32((int)x); }
INLINE U32 add_bits(U32 a, U32 b) { return _mm256_add_epi32(a, b); }
INLINE U32 and_bits(U32 a, U32 b) { return _mm256_and_si256(a, b); }
INLINE U32 left(U32 v, int n) { return _mm256_slli_epi32(v, n); }
INLINE U32 right(U32 v, int n) { return _mm256_srli_epi32(v, n); }
INLINE U32 right_signed(U32 v, int n) { return _mm256_srai_epi32(v, n); }
INLINE F32 from_int(U32 v) { return _mm256_cvtepi32_ps(v); }
INLINE U32 to_int(F32 v) { return _mm256_cvtps_epi32(v); }
INLINE U32 truncated(F32 v) { return _mm256_cvttps_epi32(v); }
INLINE U32 clamped(U32 v, int low, int high) {
  return _mm256_min_epi32(_mm256_max_epi32(v, splat_bits((uint32_t)low)), splat_bits((uint32_t)high));
}
INLINE U32 add_where_least(F32 a, F32 b, U32 v, U32 bits) {
  return add_bits(v, and_bits(as_bits(_mm256_cmp_ps(a, b, _CMP_GE_OQ)), bits));
}
INLINE F32 where_positive(F32 test, F32 v) {
  return _mm256_and_ps(v, _mm256_cmp_ps(test, zero(), _CMP_GT_OQ));
}
INLINE float least_lane(F32 v) {
  float lanes[LANES];
  store(lanes, v);
  float found = lanes[0];
  for (const float lane : lanes) found = lane < found ? lane : found;
  return found;
}
INLINE float most_lane(F32 v) { return -least_lane(subtract(zero(), v)); }
INLINE float sum_of_lanes(F32 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE F32 sums_of_each(const F32 (&v)[LANES]) {
  F32 two[4];
  for (int i = 0; i < 4; i++)
    two[i] = add(_mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  const auto lanes_of = [](F32 a, F32 b) {
    const __m256d c = _mm256_castps_pd(a), d = _mm256_castps_pd(b);
    return add(_mm256_castpd_ps(_mm256_unpacklo_pd(c, d)), _mm256_castpd_ps(_mm256_unpackhi_pd(c, d)));
  };
  const F32 first = lanes_of(two[0], two[1]), second = lanes_of(two[2], two[3]);
  return add(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31));
}
INLINE uint32_t equal_lanes(F32 a, F32 b) {
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}
INLINE void store_bytes(uint8_t* p, U32 v) {  // the lowest of each word
  uint32_t words[LANES];
  memcpy(words, &v, sizeof(v));
  for (int i = 0; i < LANES; i++) p[i] = uint8_t(words[i]);
}
INLINE U32 twice(const void* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
INLINE U32 look_up_bytes(U32 v, U32 table) { return _mm256_shuffle_epi8(table, v); }
// Byte i of each word, above 24 zeros. The three ways are carried out by different units of the processor.
INLINE U32 byte_at_top(U32 v, int i) {
  if (i == 0) return left(v, 24);
  if (i == 3) return and_bits(v, splat_bits(0xff000000));
  const int a = 0x00808080 | i << 24, b = a + (4 << 24), c = b + (4 << 24), d = c + (4 << 24);  // 0x80: zero
  return _mm256_shuffle_epi8(v, _mm256_setr_epi32(a, b, c, d, a, b, c, d));
}
INLINE F32 look_up(U32 v, F32 low, F32 high) {
  const F32 from_low = _mm256_permutevar8x32_ps(low, v), from_high = _mm256_permutevar8x32_ps(high, v);
  return _mm256_blendv_ps(from_low, from_high, as_float(left(v, 28)));
}
INLINE F32 where_nan(F32 test, F32 yes, F32 no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(test, test, _CMP_UNORD_Q));
}
INLINE bool any_nan(F32 v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0; }
INLINE U32 load_half(const uint16_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
}
INLINE void store_half(uint16_t* p, U32 v) {  // the upper halves are zero
  U32 packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 8);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
INLINE F32 load_fp16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store_fp16(uint16_t* p, F32 v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// To the nearest bf16, ties to even; a NaN stays one, an infinity too.
INLINE U32 round_to_bf16(F32 v) {
  const U32 bits = as_bits(v);
  const U32 odd = and_bits(right(bits, 16), splat_bits(1));
  const U32 rounded = right(add_bits(add_bits(bits, splat_bits(0x7fff)), odd), 16);
  return as_bits(where_nan(v, as_float(splat_bits(0x7fc0)), as_float(rounded)));
}

// LANES numbers of a type that is known at run time, from element `at` on.
INLINE F32 load_as(const void* p, DType type, int64_t at) {
  if (type == FP32) return load((const float*)p + at);
  const uint16_t* half = (const uint16_t*)p + at;
  return type == BF16 ? as_float(left(load_half(half), 16)) : load_fp16(half);
}
INLINE void store_as(void* p, DType type, int64_t at, F32 v) {
  if (type == FP32) return store((float*)p + at, v);
  uint16_t* half = (uint16_t*)p + at;
  if (type == BF16) return store_half(half, round_to_bf16(v));
  store_fp16(half, v);
}

// The same for the last elements of an array, of which only `count` may be touched.
INLINE F32 load_some(const void* p, DType type, int64_t at, int64_t count) {
  if (count >= LANES) return load_as(p, type, at);
  char buffer[LANES * 4] = {};
  if (count > 0) memcpy(buffer, (const char*)p + at * bytes_of(type), size_t(count * bytes_of(type)));
  return load_as(buffer, type, 0);
}
INLINE void store_some(void* p, DType type, int64_t at, F32 v, int64_t count) {
  if (count >= LANES) return store_as(p, type, at, v);
  char buffer[LANES * 4];
  store_as(buffer, type, 0, v);
  if (count > 0) memcpy((char*)p + at * bytes_of(type), buffer, size_t(count * bytes_of(type)));
}

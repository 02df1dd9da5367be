// The index of the level nearest to v = weight / scale: its code less the least code. As
// quant/rounding.py has it, bit for bit.
#pragma once
#include "vectors.h"

// Each code is its own level: rounding half to even.
struct Integers {
  F32 low, high;
  Integers(int64_t bits, const float*)
      : low(splat(-float(1 << (bits - 1)))), high(splat(float((1 << (bits - 1)) - 1))) {}
  INLINE_MEMBER F32 nearest_level(F32 v) const { return least(most(nearest(v), low), high); }
  INLINE_MEMBER U32 index(F32 v) const { return to_int(subtract(nearest_level(v), low)); }
  INLINE_MEMBER F32 level(U32 index) const { return add(from_int(index), low); }
};

// 16 ascending levels: the index is the number of midpoints <= v, found bit by bit.
struct Sixteen {
  F32 middle, midpoints[3][2], levels[2];
  Sixteen(int64_t, const float* values) {
    float found[32] = {};
    for (int i = 0; i < 15; i++) found[i] = (values[i] + values[i + 1]) / 2;
    middle = splat(found[7]);
    for (int step = 0; step < 3; step++) fill(midpoints[step], found + (4 >> step) - 1);
    fill(levels, values);
  }
  INLINE_MEMBER U32 index(F32 v) const {
    U32 i = add_where_least(v, middle, splat_bits(0), splat_bits(8));
    for (int step = 0; step < 3; step++)
      i = add_where_least(v, look_up(i, midpoints[step][0], midpoints[step][1]), i,
                          splat_bits(4u >> step));
    return i;
  }
  INLINE_MEMBER F32 level(U32 index) const { return look_up(index, levels[0], levels[1]); }
  INLINE_MEMBER F32 nearest_level(F32 v) const { return level(index(v)); }

 private:
  static void fill(F32* to, const float* from) {
    to[0] = load(from);
    to[1] = load(from + 16 - LANES);
  }
};

// softmax(scale q kᵀ + mask) v for few rows of q: each head's keys and values are read once, for all rows
// of q that meet them, and those that the mask hides from all of these rows are not read at all.
//
// A task is a chunk of the visible keys of one head of k and v, in blocks of BLOCK: scores of all rows,
// then their softmax relative to the largest score so far, then the sums of values. Chunks are merged
// at the end. Sums are fp32. Where the processor multiplies pairs of bf16, q k and p v are such products,
// and p, at most 1, is rounded to bf16 as the dense form rounds it; else all is widened to fp32.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attention.h"
#include "epilogue.h"
#include "parallel.h"

namespace {

constexpr int BLOCK = 32;
constexpr int64_t LEAST_CHUNK = 128;  // visible keys of a task, which takes microseconds to hand over
constexpr int64_t CHUNKS = 4;         // tasks for each thread, where heads are fewer
constexpr int64_t CACHE_LINE = 64, AHEAD = 8192;  // bytes; measured
constexpr uint32_t ALL_LANES = LANES == 16 ? 0xffff : 0xff;
constexpr float HIDDEN = -1e30f;      // a mask's value that leaves nothing of a score: of dense masks, the least number
constexpr float INF = INFINITY;

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How numbers are multiplied: widened to fp32, a unit of a row is one vector.
template <DType TYPE>
struct Widened {
  static constexpr int WIDTH = LANES, TOGETHER = 1, BYTES = TYPE == FP32 ? 4 : 2, MOST_DOTS = 4;
  static constexpr DType PACKED = FP32;
  using Unit = F32;
  using Weight = float;  // a probability
  INLINE F32 load(const char* p, int64_t at) { return load_as(p, TYPE, at); }
  INLINE F32 load(const char* p, int64_t at, int64_t count) { return load_some(p, TYPE, at, count); }
  INLINE F32 load_packed(const char* p) { return ::load((const float*)p); }
  INLINE F32 multiply_add(F32 sum, F32 q, F32 k) { return fma(q, k, sum); }
  INLINE void store_weights(float* to, F32 p) { store(to, p); }
  INLINE F32 in_order(const float* sums, int64_t at) { return ::load(sums + at); }

  // sums[row][w] += p[row] v: values of one key.
  template <int ROWS, int W>
  INLINE void add_values(F32 (&sums)[ROWS][W][TOGETHER], const F32 (&v)[TOGETHER][W], const float* p) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
      for (int w = 0; w < W; w++) sums[r][w][0] = fma(splat(p[r * BLOCK]), v[0][w], sums[r][w][0]);
  }
  INLINE F32 none() { return zero(); }
};

#if defined(__AVX512BF16__)
// In pairs of bf16: a unit is two vectors long, and its sums lie as the pairs of two keys' values do.
struct Paired {
  static constexpr int WIDTH = 2 * LANES, TOGETHER = 2, BYTES = 2, MOST_DOTS = 8;
  static constexpr DType PACKED = BF16;
  using Unit = U32;
  using Weight = uint16_t;
  INLINE U32 load(const char* p, int64_t at) { return load_words((const uint16_t*)p + at); }
  INLINE U32 load(const char* p, int64_t at, int64_t count) {
    return _mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), (const uint16_t*)p + at);
  }
  INLINE U32 load_packed(const char* p) { return load_words(p); }
  INLINE F32 multiply_add(F32 sum, U32 q, U32 k) { return _mm512_dpbf16_ps(sum, (__m512bh)q, (__m512bh)k); }
  INLINE void store_weights(uint16_t* to, F32 p) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(p));
  }
  INLINE F32 in_order(const float* sums, int64_t at) {
    const int second = at % WIDTH ? 8 : 0;
    const U32 four = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const float* pair = sums + at / WIDTH * WIDTH;
    return _mm512_permutex2var_ps(::load(pair), add_bits(four, splat_bits(second)), ::load(pair + LANES));
  }

  // Values of two keys.
  template <int ROWS, int W>
  INLINE void add_values(F32 (&sums)[ROWS][W][TOGETHER], const U32 (&v)[TOGETHER][W], const uint16_t* p) {
#pragma GCC unroll 8
    for (int w = 0; w < W; w++) {
      const U32 low = _mm512_unpacklo_epi16(v[0][w], v[1][w]), high = _mm512_unpackhi_epi16(v[0][w], v[1][w]);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const U32 pair = splat_bits(*(const Bits*)(p + r * BLOCK));
        sums[r][w][0] = multiply_add(sums[r][w][0], pair, low);
        sums[r][w][1] = multiply_add(sums[r][w][1], pair, high);
      }
    }
  }
  INLINE U32 none() { return splat_bits(0); }
};
#endif

// Keys that so many rows meet in one call.
constexpr int keys_together(int64_t rows) { return rows == 8 ? 8 : LANES / int(rows); }

// to[row * BLOCK + key]: the products of ROWS rows of packed q with some keys.
template <class Way, int ROWS>
void dot_products(const char* const* keys, const char* q, int64_t q_row, int64_t width, int64_t, float* to) {
  constexpr int KEYS = LANES / ROWS;
  F32 sum[LANES];
  for (F32& s : sum) s = zero();
  const auto step = [&](const auto& load) __attribute__((always_inline)) {
    typename Way::Unit rows[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) rows[r] = Way::load_packed(q + r * q_row);
#pragma GCC unroll 16
    for (int j = 0; j < KEYS; j++) {
      const auto key = load(keys[j]);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) sum[r * KEYS + j] = Way::multiply_add(sum[r * KEYS + j], rows[r], key);
    }
    q += sizeof(typename Way::Unit);
  };
  int64_t d = 0;
  for (; d + Way::WIDTH <= width; d += Way::WIDTH)
    step([&](const char* key) __attribute__((always_inline)) { return Way::load(key, d); });
  if (d < width)
    step([&](const char* key) __attribute__((always_inline)) { return Way::load(key, d, width - d); });
  float found[LANES];
  store(found, sums_of_each(sum));
  for (int r = 0; r < ROWS; r++) memcpy(to + r * BLOCK, found + r * KEYS, KEYS * 4);
}

#if defined(__AVX512BF16__)
// The same for eight rows. A vector of q has eight numbers of each of four rows, which all meet the same eight
// of a key: of a product four lanes are left to be summed up, where they would be sixteen. The keys that lie
// `ahead` bytes after these are fetched between products, which take longer than memory does: fetched after
// them, it would stand still meanwhile.
template <>
void dot_products<Paired, 8>(const char* const* keys, const char* q, int64_t, int64_t width, int64_t ahead,
                             float* to) {
  F32 sum[2][8];
  for (auto& four_rows : sum)
    for (F32& s : four_rows) s = zero();
  const auto step = [&](const auto& load) __attribute__((always_inline)) {
    const U32 low = load_words(q), high = load_words(q + 64);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
      const U32 key = _mm512_broadcast_i32x4(load((const uint16_t*)keys[j]));
      sum[0][j] = Paired::multiply_add(sum[0][j], low, key);
      sum[1][j] = Paired::multiply_add(sum[1][j], high, key);
    }
    q += 128;
  };
  int64_t d = 0;
  for (; d + 8 <= width; d += 8) {
    if (d % 32 == 0)  // a line of each
      for (int j = 0; j < 8; j++) _mm_prefetch(keys[j] + ahead + 2 * d, _MM_HINT_T1);
    step([&](const uint16_t* key) __attribute__((always_inline)) { return _mm_loadu_si128((const __m128i*)(key + d)); });
  }
  if (d < width)
    step([&](const uint16_t* key) __attribute__((always_inline)) {
      return _mm_maskz_loadu_epi16((__mmask8)((1 << (width - d)) - 1), key + d);
    });
  const auto in_pairs = [](F32 a, F32 b) { return add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
  for (int half = 0; half < 2; half++)
    for (int j = 0; j < 8; j += 4) {
      const __m512d a = _mm512_castps_pd(in_pairs(sum[half][j], sum[half][j + 1]));
      const __m512d b = _mm512_castps_pd(in_pairs(sum[half][j + 2], sum[half][j + 3]));
      float found[LANES];  // [row][key], four of each
      store(found, add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b))));
      for (int r = 0; r < 4; r++) memcpy(to + (4 * half + r) * BLOCK + j, found + 4 * r, 16);
    }
}
#endif

// The values of one block; `ahead` bytes after each, those of the next one begin.
struct Values {
  const char* rows[BLOCK];
  int64_t count, ahead;
};

// sums[row][at ... at + W units] += Σ p[row][key] v[key] over `count` keys; `last` numbers where the only
// unit is not whole.
template <class Way, int ROWS, int W, bool WHOLE>
void weighted_sums(const Values& values, const typename Way::Weight* p, int64_t at, int64_t last, float* sums,
                   int64_t row) {
  constexpr int N = Way::TOGETHER;
  F32 sum[ROWS][W][N];
  const auto each = [&](const auto& act) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
      for (int w = 0; w < W; w++)
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) act(sum[r][w][n], sums + r * row + at + w * Way::WIDTH + n * LANES);
  };
  each([](F32& s, const float* from) __attribute__((always_inline)) { s = load(from); });
  const auto load_values = [&](typename Way::Unit (&v)[W], const char* from) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int w = 0; w < W; w++)
    {
      v[w] = WHOLE ? Way::load(from, at + w * Way::WIDTH) : Way::load(from, at, last);
      _mm_prefetch(from + values.ahead + (at + w * Way::WIDTH) * Way::BYTES, _MM_HINT_T1);
    }
  };
  typename Way::Unit v[N][W];
  int64_t j = 0;
  for (; j + N <= values.count; j += N) {
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) load_values(v[n], values.rows[j + n]);
    Way::template add_values<ROWS, W>(sum, v, p + j);
  }
  if (j < values.count) {  // half a pair
    load_values(v[0], values.rows[j]);
    for (auto& unit : v[N - 1]) unit = Way::none();
    Way::template add_values<ROWS, W>(sum, v, p + j);
  }
  each([](const F32& s, float* to) __attribute__((always_inline)) { store(to, s); });
}

// The largest count of rows that one call serves.
constexpr int MOST_SUMS = LANES == 16 ? 8 : 4;

template <class Way, int ROWS = Way::MOST_DOTS>
void dot_products(int64_t rows, const char* const* keys, const char* q, int64_t q_row, int64_t width, int64_t ahead,
                  float* to) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return dot_products<Way, ROWS / 2>(rows, keys, q, q_row, width, ahead, to);
  dot_products<Way, ROWS>(keys, q, q_row, width, ahead, to);
}

template <class Way, int ROWS>
void all_sums(const Values& values, const typename Way::Weight* p, int64_t width, float* sums, int64_t row) {
  constexpr int W = std::min(4, MOST_SUMS / ROWS);
  int64_t d = 0;
  for (; d + W * Way::WIDTH <= width; d += W * Way::WIDTH)
    weighted_sums<Way, ROWS, W, true>(values, p, d, 0, sums, row);
  for (; d + Way::WIDTH <= width; d += Way::WIDTH)
    weighted_sums<Way, ROWS, 1, true>(values, p, d, 0, sums, row);
  if (d < width) weighted_sums<Way, ROWS, 1, false>(values, p, d, width - d, sums, row);
}

template <class Way, int ROWS = MOST_SUMS>
void all_sums(int64_t rows, const Values& values, const typename Way::Weight* p, int64_t width, float* sums,
              int64_t row) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return all_sums<Way, ROWS / 2>(rows, values, p, width, sums, row);
  all_sums<Way, ROWS>(values, p, width, sums, row);
}

int64_t power_of_two_within(int64_t n, int64_t most) {
  while (most > n) most /= 2;
  return most;
}

// e^x, and zero below e^-87; a NaN is handed on.
INLINE F32 weight_of(F32 x) {
  const F32 e = exponential(x);
  return subtract(e, where_positive(subtract(splat(-87.0f), x), e));
}

INLINE float weight_of(float x) {
  float lanes[LANES];
  store(lanes, weight_of(splat(x)));
  return lanes[0];
}

INLINE float finite_or_zero(float top) { return top == -INF ? 0.0f : top; }

// Of memory, so that it is in the second cache when it is read.
INLINE void prefetch(const char* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += CACHE_LINE) _mm_prefetch(from + at, _MM_HINT_T1);
}

// cap tanh(y), y = x / cap, within 16 units of its last place. For y^2 < 1/16 it is the Taylor series, whose
// next term is below 1e-8 of it: 1 - 2 / (1 + e) is within units of 1, which a wide cap would make large.
INLINE F32 capped(F32 x, float cap) {
  const F32 y = multiply(x, splat(1.0f / cap)), square = multiply(y, y), small = subtract(splat(0.0625f), square);
  F32 series = splat(62.0f / 2835);
  for (const float c : {-17.0f / 315, 2.0f / 15, -1.0f / 3, 1.0f}) series = fma(series, square, splat(c));
  const F32 e = exponential(add(y, y));
  const F32 far = multiply(splat(cap), subtract(splat(1.0f), divide(splat(2.0f), add(splat(1.0f), e))));
  return add(where_positive(small, multiply(x, series)), subtract(far, where_positive(small, far)));
}

// Of a mask: what is false is hidden.
INLINE float number(const char* at, int64_t type) {
  if (type == BOOL) return *at ? 0 : -INF;
  if (type == FP32) return *(const float*)at;
  if (type == FP16) return _cvtsh_ss(*(const uint16_t*)at);
  const uint32_t bits = uint32_t(*(const uint16_t*)at) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The visible keys of each plane: of all rows that share a part of the mask. The lists stay for the
// thread's next call, as long as the longest was: 5 bytes a key, where its numbers have hundreds.
class Visible {
 public:
  Visible(const AttentionCall& call)
      : c(call),
        batches(c.mask.data && c.mask.batch ? c.batch : 1),
        heads(c.mask.data && c.mask.head ? c.kv_heads : 1),
        counts(size_t(batches * heads)) {
    thread_local std::vector<int32_t> kept;
    kept.resize(std::max(kept.size(), size_t(batches * heads * c.keys)));
    indices = kept.data();
    const bool short_work = batches * heads * c.keys * c.queries < (1 << 16);
    in_parallel(batches * heads, c.one_thread || short_work, [&](int64_t i) { find(i); });
  }

  int64_t plane(int64_t b, int64_t kv_head) const {
    return (batches > 1 ? b : 0) * heads + (heads > 1 ? kv_head : 0);
  }
  const int32_t* keys(int64_t plane) const { return indices + plane * c.keys; }
  int64_t count(int64_t plane) const { return counts[size_t(plane)]; }
  int64_t most() const { return *std::max_element(counts.begin(), counts.end()); }

  // Whether a visible key is visible for every row, and as it is.
  bool is_all() const {
    const bool rows_differ = c.queries > 1 && (c.causal || c.mask.row);
    const bool heads_differ = c.mask.head && c.heads > c.kv_heads;
    return !c.mask.data ? !(c.causal && c.queries > 1) : c.mask_type == BOOL && !rows_differ && !heads_differ;
  }

  // What is added to the score of one row: -inf hides a key.
  float bias(const char* mask, int64_t query, int64_t key) const {
    if (c.causal && key > query) return -INF;
    return c.mask.data ? number(mask + key * c.mask_key, c.mask_type) : 0;
  }

 private:
  const AttentionCall& c;
  const int64_t batches, heads;
  std::vector<int64_t> counts;
  int32_t* indices;

  void find(int64_t plane) {
    thread_local std::vector<uint8_t> seen;
    seen.assign(size_t(rounded_up(c.keys, 8)), 0);
    if (!c.mask.data)
      std::fill_n(seen.begin(), c.causal ? std::min(c.keys, c.queries) : c.keys, 1);
    else if (!mark(plane, seen.data(), HIDDEN))  // of some row nothing would be left: all keys count
      mark(plane, seen.data(), -INF);
    int32_t* to = indices + plane * c.keys;
    for (int64_t start = 0; start < c.keys; start += 8) {
      uint64_t eight;
      memcpy(&eight, &seen[size_t(start)], 8);
      for (int64_t j = start; eight; j++, eight >>= 8) {
        *to = int32_t(j);
        to += eight & 1;
      }
    }
    counts[size_t(plane)] = to - (indices + plane * c.keys);
  }

  // Marks the keys that some row of the plane sees: of which the mask's value is above `hidden`, or NaN.
  // False where a row sees none.
  bool mark(int64_t plane, uint8_t* seen, float hidden) const {
    const int64_t own_heads = c.mask.head ? c.heads / c.kv_heads : 1, own_rows = c.mask.row ? c.queries : 1;
    bool all = true;
    for (int64_t i = 0; i < own_heads * own_rows; i++) {
      const int64_t h = plane % heads * own_heads + i / own_rows;
      all &= mark_row(c.mask.at(plane / heads, h, i % own_rows), seen, hidden);
    }
    return all;
  }

  bool mark_row(const char* mask, uint8_t* seen, float hidden) const {
    uint8_t any = 0;
    const auto see = [&](int64_t j, bool visible) __attribute__((always_inline)) {
      any |= uint8_t(visible);
      seen[j] |= uint8_t(visible);
    };
    if (c.mask_type == BOOL && c.mask_key == 1)
      for (int64_t j = 0; j < c.keys; j++) see(j, mask[j] != 0);
    else
      for (int64_t j = 0; j < c.keys; j++) see(j, !(bias(mask, 0, j) <= hidden));
    return any;
  }
};

template <class Way>
class Attention {
 public:
  Attention(const AttentionCall& call) : c(call), visible(call), as_is(visible.is_all()) {}

  void run() {
    uint32_t threads = 1;
    if (!c.one_thread) torch_get_num_threads(&threads);
    const int64_t pairs = c.batch * c.kv_heads, wanted = threads > 1 ? (CHUNKS * threads + pairs - 1) / pairs : 1;
    const int64_t chunks = std::max<int64_t>(1, std::min(wanted, visible.most() / LEAST_CHUNK));
    thread_local std::vector<float> kept;
    kept.resize(std::max(kept.size(), size_t(chunks > 1 ? pairs * chunks * part_size() : 0)));
    float* parts = kept.data();
    in_parallel(pairs * chunks, c.one_thread, [&](int64_t i) {
      float* part = scratch();
      attend(i / chunks, i % chunks, chunks, part);
      if (chunks == 1) return finish(i, part, 1);
      std::copy_n(part, part_size(), parts + i * part_size());
    });
    for (int64_t pair = 0; chunks > 1 && pair < pairs; pair++)
      finish(pair, parts + pair * chunks * part_size(), chunks);
  }

 private:
  using Unit = typename Way::Unit;
  using Weight = typename Way::Weight;
  const AttentionCall& c;
  const Visible visible;
  const bool as_is;

  // A part has a record for each row: sums of values, LANES sums of weights, and the largest score, to
  // which both are relative.
  int64_t sums() const { return rounded_up(c.v_width, Way::WIDTH); }
  int64_t record() const { return sums() + LANES + LANES; }
  int64_t part_size() const { return c.rows() * record(); }
  float& top_of(float* row) const { return row[sums() + LANES]; }
  int64_t q_row() const { return rounded_up(c.width, Way::WIDTH) / Way::WIDTH * int64_t(sizeof(Unit)); }

  // Of this thread: a part, scores [rows][BLOCK], weights [rows][BLOCK], packed q [rows][q_row()].
  float* scratch() const {
    thread_local std::vector<float> kept;
    const int64_t size = part_size() + 2 * c.rows() * BLOCK + c.rows() * q_row() / 4;
    kept.resize(std::max(kept.size(), size_t(size + CACHE_LINE)));
    return (float*)rounded_up((int64_t)kept.data(), CACHE_LINE);
  }

  // Rows of q that meet one head of k, those of one query side by side.
  int64_t head_of(int64_t kv_head, int64_t row) const {
    const int64_t shared = c.heads / c.kv_heads;
    return kv_head * shared + row % shared;
  }
  int64_t query_of(int64_t row) const { return row / (c.heads / c.kv_heads); }

  // In the order in which dot_products reads it.
  void pack_q(int64_t b, int64_t kv_head, char* to) const {
    memset(to, 0, size_t(c.rows() * q_row()));
    for (int64_t r = 0, taken; r < c.rows(); r += taken, to += taken * q_row()) {
      taken = power_of_two_within(c.rows() - r, Way::MOST_DOTS);
      for (int64_t i = 0; i < taken; i++) {
        const char* from = c.q.at(b, head_of(kv_head, r + i), query_of(r + i));
        if (Way::PACKED != c.type)
          for (int64_t d = 0; d < c.width; d += LANES)
            store((float*)(to + i * q_row()) + d, load_some(from, c.type, d, c.width - d));
        else if (taken == 8)
          for (int64_t d = 0; d < c.width; d += 8)
            memcpy(to + (d + i) * 16, from + 2 * d, size_t(2 * std::min<int64_t>(8, c.width - d)));
        else if (c.width > 0)  // else q is null
          memcpy(to + i * q_row(), from, size_t(c.width * bytes_of(c.type)));
      }
    }
  }

  // Fills one part.
  void attend(int64_t pair, int64_t chunk, int64_t chunks, float* part) const {
    const int64_t b = pair / c.kv_heads, kv_head = pair % c.kv_heads, rows = c.rows();
    const int64_t plane = visible.plane(b, kv_head), count = visible.count(plane);
    float* scores = part + part_size();
    Weight* weights = (Weight*)(scores + rows * BLOCK);
    char* q = (char*)(scores + 2 * rows * BLOCK);
    std::fill_n(part, part_size(), 0.0f);
    for (int64_t r = 0; r < rows; r++) top_of(part + r * record()) = -INF;
    pack_q(b, kv_head, q);
    const char* keys[BLOCK + LANES];
    Values values;
    bool first = true;
    const int64_t end = count * (chunk + 1) / chunks;
    for (int64_t start = count * chunk / chunks; start < end; start += BLOCK) {
      const int32_t* some = visible.keys(plane) + start;
      const int64_t n = std::min<int64_t>(BLOCK, end - start);
      for (int64_t j = 0; j < n; j++) {
        keys[j] = c.k.at(b, kv_head, some[j]);
        values.rows[j] = c.v.at(b, kv_head, some[j]);
      }
      values.count = n;
      values.ahead = start + BLOCK < end ? BLOCK * c.v.row : 0;
      std::fill_n(keys + n, LANES, keys[n - 1]);
      score(n, keys, first ? values.rows : nullptr, q, scores);
      weigh(b, kv_head, some, n, scores, weights, part);
      for (int64_t r = 0, taken; r < rows; r += taken) {
        taken = power_of_two_within(rows - r, MOST_SUMS);
        all_sums<Way>(taken, values, weights + r * BLOCK, c.v_width, part + r * record(), record());
        values.ahead = 0;
      }
      first = false;
    }
  }

  // q kᵀ of one block; prefetches keys that follow, evenly, and those of `values` that are given.
  void score(int64_t n, const char* const* keys, const char* const* values, const char* q, float* scores) const {
    const int64_t rows = c.rows(), k_bytes = c.width * bytes_of(c.type), v_bytes = c.v_width * bytes_of(c.type);
    const int64_t ahead = (AHEAD / std::max<int64_t>(k_bytes, 1) + 1) * c.k.row;
    for (int64_t r = 0, taken; r < rows; r += taken) {
      taken = power_of_two_within(rows - r, Way::MOST_DOTS);
      const int64_t together = keys_together(taken), begin = k_bytes * r / rows, share = k_bytes * taken / rows;
      for (int64_t j = 0; j < n; j += together) {
        dot_products<Way>(taken, keys + j, q + r * q_row(), q_row(), c.width, r ? 0 : ahead, scores + r * BLOCK + j);
        for (int64_t i = j; i < std::min(j + together, n); i++) {
          if (taken < 8) prefetch(keys[i] + ahead + begin, share);
          if (values && r == 0) prefetch(values[i], v_bytes);
        }
      }
    }
  }

  // From scores to weights e^(score - largest), which are added up.
  void weigh(int64_t b, int64_t kv_head, const int32_t* keys, int64_t n, float* scores, Weight* weights,
             float* part) const {
    float bias[BLOCK];
    std::fill_n(bias, BLOCK, -INF);
    std::fill_n(bias, n, 0.0f);
    for (int64_t r = 0; r < c.rows(); r++, scores += BLOCK, weights += BLOCK, part += record()) {
      const int64_t h = head_of(kv_head, r), query = query_of(r);
      if (!as_is && (r == 0 || c.mask.head || query != query_of(r - 1)))
        for (int64_t j = 0; j < n; j++) bias[j] = visible.bias(c.mask.at(b, h, query), query, keys[j]);
      std::fill_n(scores + n, BLOCK - n, 0.0f);  // of no key, and maybe an earlier call's NaN
      const F32 before = splat(top_of(part));
      F32 top = before, x[BLOCK / LANES];
#pragma GCC unroll 4
      for (int j = 0; j < BLOCK / LANES; j++) {
        x[j] = multiply(load(scores + j * LANES), splat(float(c.scale)));
        if (c.softcap != 0) x[j] = capped(x[j], float(c.softcap));
        x[j] = add(x[j], load(bias + j * LANES));
        top = most(top, x[j]);
      }
      if (equal_lanes(top, before) != ALL_LANES) raise(part, std::max(top_of(part), most_lane(top)));
      const F32 base = splat(finite_or_zero(top_of(part)));
      float* total = part + sums();
      F32 sum = load(total);
#pragma GCC unroll 4
      for (int j = 0; j < BLOCK / LANES; j++) {
        const F32 p = weight_of(subtract(x[j], base));
        Way::store_weights(weights + j * LANES, p);
        sum = add(sum, p);
      }
      store(total, sum);
    }
  }

  // Makes a record relative to a larger score.
  void raise(float* row, float top) const {
    const F32 factor = splat(weight_of(top_of(row) - finite_or_zero(top)));
    for (int64_t i = 0; i < sums() + LANES; i += LANES) store(row + i, multiply(load(row + i), factor));
    top_of(row) = top;
  }

  // Relative to the largest score, to which the row is raised.
  float weight_of_sink(int64_t pair, int64_t r, float* row) const {
    if (!c.sinks.data) return 0;
    const float score = number(c.sinks.at(pair / c.kv_heads, head_of(pair % c.kv_heads, r), query_of(r)), c.sinks_type);
    raise(row, std::max(top_of(row), score));
    return weight_of(score - finite_or_zero(top_of(row)));
  }

  // Adds up the parts of all chunks of one head's keys, and writes its rows of the result.
  void finish(int64_t pair, float* parts, int64_t chunks) const {
    for (int64_t r = 0; r < c.rows(); r++) {
      float* row = parts + r * record();
      for (int64_t i = 1; i < chunks; i++) {
        float* other = row + i * part_size();
        const float top = std::max(top_of(row), top_of(other));
        raise(row, top);
        raise(other, top);
        for (int64_t d = 0; d < sums() + LANES; d += LANES) store(row + d, add(load(row + d), load(other + d)));
      }
      const float sink = weight_of_sink(pair, r, row);  // before the sums are read: it may raise them
      const float total = sum_of_lanes(load(row + sums())) + sink;
      const F32 nothing = splat(c.nan_if_hidden && c.keys ? NAN : 0.0f);
      const int64_t at = (pair / c.kv_heads * c.queries + query_of(r)) * c.heads + head_of(pair % c.kv_heads, r);
      for (int64_t d = 0; d < c.v_width; d += LANES) {
        const F32 mean = total == 0 ? nothing : divide(Way::in_order(row, d), splat(total));
        store_some(c.out, c.type, at * c.v_width + d, mean, c.v_width - d);
      }
    }
  }
};

}  // namespace

void attend(const AttentionCall& call) {
#if defined(__AVX512BF16__)
  if (call.type == BF16) return Attention<Paired>(call).run();
#endif
  if (call.type == FP32) return Attention<Widened<FP32>>(call).run();
  if (call.type == BF16) return Attention<Widened<BF16>>(call).run();
  Attention<Widened<FP16>>(call).run();
}

extern "C" EXPORT int64_t fqcompile_attention(const char* bytes) {
  AttentionCall call;
  memcpy(&call, bytes, sizeof(call));
  return without_exceptions([&] { return attend(call), 0; });
}

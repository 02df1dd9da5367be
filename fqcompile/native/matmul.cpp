// act(x @ ŵᵀ + bias) + residual for packed int4 and int8 weights, of one matrix or of a stack of
// experts; and ŵ itself, for large numbers of rows and for backward passes.
//
// Layout (stream_layout.py packs it): outputs in blocks of 64, and a block in the order it is read:
//   words  [block][K rounded up to 8, / WORD][64]   see codes.h
//   scales [block][group][64]
// so one pass over K reads memory strictly forward, and every instruction serves LANES outputs.
//
// A task is one block for all rows of x that meet it; threads take tasks in turn. Rows are taken up
// to 8 at a time: a tile, whose sums stay in registers. Codes are summed up before they are scaled.
#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "call.h"
#include "codes.h"
#include "epilogue.h"
#include "parallel.h"

namespace {

constexpr int VECTORS = OUTPUTS / LANES, MAX_TILE = 8;
constexpr int64_t LONGEST_SUM = 256;  // codes that are summed up unscaled; x's part fits the L1 cache
// A thread reads so many bytes in a row, where there are RUNS such runs for each: every start waits for
// memory. Measured, a layer of experts (8 of 64, 2048x768), 2 threads: blocks one by one 640 us in its
// two products, in such runs 530.
constexpr int64_t RUN_BYTES = 1 << 18;
constexpr int AHEAD = 4096;           // bytes to prefetch ahead: hardware stops at the page's end

template <class Code>
INLINE F32 in_units(F32 v) {
  return Code::UNIT == 1 ? v : multiply(v, splat(Code::UNIT));
}

// sums[row][64] of one block for ROWS rows of packed x: [k / PER_UNIT][ROWS].
template <class Code, int ROWS>
void tile(const Weight& w, const Levels& levels, int64_t block, const Bits* x, float* sums, int64_t stride) {
  // As many vectors of outputs as leave registers for their codes; two sums for each where there are so few
  // that each would wait for its last addition.
  constexpr int WIDE = LANES == 16 ? (ROWS <= 4 ? 4 : 2) : (ROWS <= 2 ? 4 : ROWS <= 4 ? 2 : 1);
  constexpr int CHAINS = ROWS * WIDE <= 5 ? 2 : 1;
  const Code code(levels);
  const uint32_t* words = w.words + block * w.block_words();
  const int64_t padded = w.padded_k(), scales = block * w.block_scales();
  for (int64_t start = 0, end; start < padded; start = end) {
    const int64_t group = start / w.group;
    const int64_t group_end = group + 1 < w.groups() ? (group + 1) * w.group : padded;
    end = std::min(start + LONGEST_SUM, group_end);
    for (int v = 0; v < VECTORS; v += WIDE) {
      F32 sum[CHAINS][ROWS][WIDE];
      for (auto& chain : sum)
        for (auto& row : chain)
          for (F32& s : row) s = zero();
      const uint32_t* from = words + start / Code::WORD * OUTPUTS + v * LANES;
      const Bits* xs = x + start / Code::PER_UNIT * ROWS;
      for (int64_t k = start; k < end; k += Code::WORD) {
        U32 word[WIDE];
#pragma GCC unroll 4
        for (int j = 0; j < WIDE; j++) {
          word[j] = load_words(from + j * LANES);
          _mm_prefetch((const char*)(from + j * LANES) + AHEAD, _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int u = 0; u < Code::UNITS; u++)
#pragma GCC unroll 4
          for (int j = 0; j < WIDE; j++) {
            const auto unit = code.unit(word[j], u);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
              F32& s = sum[u % CHAINS][r][j];
              s = Code::mac(s, unit, xs[Code::x_of(u) * ROWS + r]);
            }
          }
        from += OUTPUTS;
        xs += Code::WORD / Code::PER_UNIT * ROWS;
      }
#pragma GCC unroll 4
      for (int j = 0; j < WIDE; j++) {
        const F32 scale = load_as(w.scales, w.scale_type, scales + group * OUTPUTS + (v + j) * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          float* to = sums + r * stride + (v + j) * LANES;
          const F32 total = CHAINS == 2 ? add(sum[0][r][j], sum[CHAINS - 1][r][j]) : sum[0][r][j];
          store(to, fma(in_units<Code>(total), scale, start ? load(to) : zero()));
        }
      }
    }
  }
}

// ŵ of one block, k from start to end, as fp32 [k - start][64]; start is a multiple of 8.
template <class Code>
void values(const Weight& w, const Levels& levels, int64_t block, int64_t start, int64_t end, float* to) {
  constexpr int WORD = Code::WORD;
  const Code codes(levels);
  const uint32_t* words = w.words + block * w.block_words() + start / WORD * OUTPUTS;
  int64_t group = std::min(start / w.group, w.groups() - 1) - 1, group_end = 0;
  F32 scale[VECTORS];
  for (int64_t k = start; k < end; k += WORD, words += OUTPUTS) {
#pragma GCC unroll 8
    for (int i = 0; i < WORD; i++, to += OUTPUTS) {
      if (k + i >= group_end) {
        group++;
        group_end = group + 1 < w.groups() ? (group + 1) * w.group : w.padded_k();
        const int64_t at = block * w.block_scales() + group * OUTPUTS;
        for (int v = 0; v < VECTORS; v++) scale[v] = load_as(w.scales, w.scale_type, at + v * LANES);
      }
      for (int v = 0; v < VECTORS; v++) {
        const F32 code = in_units<Code>(codes.at(load_words(words + v * LANES), i));
        store(to + v * LANES, multiply(code, scale[v]));
      }
    }
  }
}

// Number k of row r of packed x, as fp32.
template <DType X>
INLINE F32 splat_x(const Bits* x, int64_t k, int rows, int r) {
  if (X == FP32) return as_float(splat_bits(x[k * rows + r]));
  const uint32_t pair = x[k / 2 * rows + r];
  return as_float(splat_bits(k % 2 ? pair & 0xffff0000 : pair << 16));
}

// As `tile`, with every weight scaled before it is multiplied: for groups that end within a word, and for
// sums that are not finite. Infinity times half a code, or a large number times a code that no scale has
// made small yet, must not decide whether the product with the weight is.
template <class Code, DType X>
void scaled_tile(const Weight& w, const Levels& levels, int64_t block, const Bits* x, int rows, float* sums, int64_t stride) {
  constexpr int64_t PART = 32;
  float part[PART * OUTPUTS];
  const int64_t padded = w.padded_k();
  for (int64_t start = 0; start < padded; start += PART) {
    const int64_t end = std::min(start + PART, padded);
    values<Code>(w, levels, block, start, end, part);
    for (int r = 0; r < rows; r++) {
      float* to = sums + r * stride;
      F32 sum[VECTORS];
      for (int v = 0; v < VECTORS; v++) sum[v] = start ? load(to + v * LANES) : zero();
      for (int64_t k = start; k < end; k++) {
        const F32 factor = splat_x<X>(x, k, rows, r);
        for (int v = 0; v < VECTORS; v++)
          sum[v] = fma(load(part + (k - start) * OUTPUTS + v * LANES), factor, sum[v]);
      }
      for (int v = 0; v < VECTORS; v++) store(to + v * LANES, sum[v]);
    }
  }
}

// ŵᵀ of one block: [k][rows of it], `stride` numbers from one k to the next.
template <class Code>
void dequantize_block(const Weight& w, const Levels& levels, int64_t block, DType type, char* to,
                      int64_t stride) {
  constexpr int64_t PART = 32;
  float part[PART * OUTPUTS];
  const int64_t count = std::min<int64_t>(OUTPUTS, w.rows - block * OUTPUTS);
  for (int64_t start = 0; start < w.k; start += PART) {
    const int64_t end = std::min(start + PART, w.k);
    values<Code>(w, levels, block, start, std::min(start + PART, w.padded_k()), part);
    for (int64_t k = start; k < end; k++)
      for (int64_t i = 0; i < count; i += LANES)
        store_some(to, type, k * stride + i, load(part + (k - start) * OUTPUTS + i), count - i);
  }
}

template <class Few, class Code>  // one way for one or two rows, one for more
void tile_of(const Weight& w, const Levels& levels, int64_t block, const Bits* x, int rows, float* sums,
             int64_t stride) {
  switch (rows) {
    case 1: return tile<Few, 1>(w, levels, block, x, sums, stride);
    case 2: return tile<Few, 2>(w, levels, block, x, sums, stride);
    case 3: return tile<Code, 3>(w, levels, block, x, sums, stride);
    case 4: return tile<Code, 4>(w, levels, block, x, sums, stride);
    case 5: return tile<Code, 5>(w, levels, block, x, sums, stride);
    case 6: return tile<Code, 6>(w, levels, block, x, sums, stride);
    case 7: return tile<Code, 7>(w, levels, block, x, sums, stride);
    default: return tile<Code, 8>(w, levels, block, x, sums, stride);
  }
}

// ŵ of one row, as fp32. A row has one code of each word and one scale of each 64 that a block reads.
void dequantize_row(const Weight& w, const Levels& levels, int64_t row, float* to) {
  const int64_t block = row / OUTPUTS, place = row % OUTPUTS, bits = w.bits, per_word = 32 / bits;
  const uint32_t* words = w.words + block * w.block_words() + place;
  for (int64_t g = 0; g < w.groups(); g++) {
    float scale[LANES];
    store(scale, load_some(w.scales, w.scale_type, block * w.block_scales() + g * OUTPUTS + place, 1));
    for (int64_t k = g * w.group; k < std::min((g + 1) * w.group, w.k); k++) {
      const int64_t i = k % per_word, bit = 16 * (i & 1) + bits * (i >> 1);  // see codes.h
      const uint32_t code = words[k / per_word * OUTPUTS] >> bit;
      to[k] = (bits == 4 ? levels.fp32[code & 15] : float(int8_t(code))) * scale[0];
    }
  }
}

using Multiply = void (*)(const Weight&, const Levels&, int64_t, const Bits*, int, float*, int64_t);
using Dequantize = void (*)(const Weight&, const Levels&, int64_t, DType, char*, int64_t);

// How a weight is multiplied: the function, the one for sums that it leaves infinite or NaN, and the type
// that both want x in; and how it is dequantized.
struct Way {
  Multiply multiply, scaled;
  DType x;
  Dequantize dequantize;
};

template <int BITS, bool LOOKED_UP>
Way way_of(const Weight& w, [[maybe_unused]] DType x) {
  using Code = Codes<BITS, LOOKED_UP>;
  const Dequantize dequantize = dequantize_block<Code>;
  if (w.odd_groups()) return {scaled_tile<Code, FP32>, nullptr, FP32, dequantize};
#if defined(__AVX512BF16__)
  using Few = std::conditional_t<BITS == 8, Halved, PairedNibbles>;
  using Many = std::conditional_t<BITS == 8, PairedBytes, PairedNibbles>;
  if (x == BF16) return {tile_of<Few, Many>, scaled_tile<Code, BF16>, BF16, dequantize};
#endif
  using Widened = Single<BITS, LOOKED_UP>;
  return {tile_of<Widened, Widened>, scaled_tile<Code, FP32>, FP32, dequantize};
}

Way way_of(const Weight& w, const Levels& levels, DType x) {
  if (w.bits == 8) return way_of<8, false>(w, x);
  if constexpr (LANES < 16)
    if (levels.integers) return way_of<4, false>(w, x);
  return way_of<4, true>(w, x);
}

// Rows of x that meet one expert, at most MAX_TILE: `order[first ...]`.
struct Tile {
  int64_t first;
  int rows;
};

struct Job {
  int64_t expert;
  std::vector<Tile> tiles;
};

class Matmul {
 public:
  Matmul(const Call& call)
      : c(call), levels(call.weight.values), way(way_of(c.weight, levels, c.type)) {}

  bool run() {
    if (!route()) return false;
    pack_x();
    const int64_t blocks = (c.n() + OUTPUTS - 1) / OUTPUTS;
    const auto task = [&](int64_t i) {
      for (const Tile& t : jobs[size_t(i / blocks)].tiles) finish(jobs[size_t(i / blocks)], t, i % blocks);
    };
    in_parallel(int64_t(jobs.size()) * blocks, c.one_thread, task, RUN_BYTES / (4 * c.weight.block_words()));
    return true;
  }

 private:
  const Call& c;
  const Levels levels;
  const Way way;
  std::vector<int64_t> order;  // rows of x, those of one expert side by side
  std::vector<Job> jobs;
  const Bits* packed = nullptr;  // per tile [k][rows] of fp32, or [k / 2][rows] of pairs of bf16

  int64_t entry(int64_t i) const {
    return c.routing_bytes == 8 ? ((const int64_t*)c.routing)[i] : ((const int32_t*)c.routing)[i];
  }

  // Fills order and jobs; false where the routing names a row or an expert that there is not.
  bool route() {
    std::vector<int64_t> ends(size_t(c.experts), c.m);
    if (c.routing && c.routing_is_ids) {
      std::fill(ends.begin(), ends.end(), 0);
      for (int64_t i = 0; i < c.m; i++) {
        if (entry(i) < -c.experts || entry(i) >= c.experts) return false;
        ends[size_t((entry(i) + c.experts) % c.experts)]++;
      }
      for (size_t e = 1; e < ends.size(); e++) ends[e] += ends[e - 1];
      std::vector<int64_t> next(1, 0);
      next.insert(next.end(), ends.begin(), ends.end() - 1);
      order.resize(size_t(c.m));
      for (int64_t i = 0; i < c.m; i++)
        order[size_t(next[size_t((entry(i) + c.experts) % c.experts)]++)] = i;
    } else {
      int64_t last = 0;
      for (int64_t e = 0; c.routing && e < c.experts; e++) {
        ends[size_t(e)] = entry(e);
        if (entry(e) < last || entry(e) > c.m) return false;
        last = entry(e);
      }
      order.resize(size_t(ends.back()));
      for (size_t i = 0; i < order.size(); i++) order[i] = int64_t(i);
    }
    for (int64_t e = 0, first = 0; e < c.experts; first = ends[size_t(e++)])
      if (ends[size_t(e)] > first) add_job(e, first, ends[size_t(e)] - first);
    return true;
  }

  // Tiles of nearly equal height.
  void add_job(int64_t expert, int64_t first, int64_t rows) {
    jobs.push_back({expert, {}});
    for (int64_t left = (rows + MAX_TILE - 1) / MAX_TILE; left > 0; left--) {
      const int64_t taken = (rows + left - 1) / left;
      jobs.back().tiles.push_back({first, int(taken)});
      first += taken;
      rows -= taken;
    }
  }

  int64_t words_per_row() const { return c.weight.padded_k() / (way.x == BF16 ? 2 : 1); }

  // One row that already is as a tile of it would be is read where it is.
  void pack_x() {
    if (order.size() == 1 && way.x == c.type && c.weight.k % STEP == 0) {
      packed = (const Bits*)((const char*)c.x + order[0] * c.x_stride * bytes_of(c.type));
      return;
    }
    thread_local std::vector<uint32_t> buffer;
    buffer.resize(std::max(buffer.size(), order.size() * size_t(words_per_row())));
    packed = buffer.data();
    uint32_t* to = buffer.data();
    std::vector<Tile> tiles;
    for (const Job& job : jobs) tiles.insert(tiles.end(), job.tiles.begin(), job.tiles.end());
    const bool short_work = int64_t(order.size()) * c.weight.k < (1 << 17);
    in_parallel(int64_t(tiles.size()), c.one_thread || short_work,
                [&, to](int64_t i) { pack_tile(tiles[size_t(i)], to); });
  }

  void pack_tile(const Tile& t, uint32_t* to) {
    to += t.first * words_per_row();
    std::vector<float> row(size_t(c.weight.padded_k()) + LANES, 0.0f);
    for (int r = 0; r < t.rows; r++) {
      const int64_t start = order[size_t(t.first + r)] * c.x_stride;
      const char* from = (const char*)c.x + start * bytes_of(c.type);
      if (way.x == BF16) {
        memcpy(row.data(), from, size_t(c.weight.k) * 2);
      } else {
        for (int64_t k = 0; k < c.weight.k; k += LANES)
          store(&row[size_t(k)], load_some(from, c.type, k, c.weight.k - k));
      }
      for (int64_t i = 0; i < words_per_row(); i++) memcpy(to + i * t.rows + r, &row[size_t(i)], 4);
    }
  }

  // z[row][64] for outputs [start, start + 64) of the weight, which may lie across two blocks.
  // Rows of z are 128 long; the result begins at z + the value returned.
  int64_t outputs(const Weight& w, int64_t start, const Tile& t, float* z) const {
    const Bits* x = packed + t.first * words_per_row();
    const int64_t block = start / OUTPUTS, skip = start % OUTPUTS;
    sums(w, block, x, t.rows, z);
    if (skip && block + 1 < w.blocks()) sums(w, block + 1, x, t.rows, z + OUTPUTS);
    return skip;
  }

  void sums(const Weight& w, int64_t block, const Bits* x, int rows, float* z) const {
    way.multiply(w, levels, block, x, rows, z, 2 * OUTPUTS);
    if (!way.scaled) return;
    F32 zeros = zero();  // unless something is infinite or NaN
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < VECTORS; v++) zeros = fma(load(z + r * 2 * OUTPUTS + v * LANES), zero(), zeros);
    if (any_nan(zeros)) way.scaled(w, levels, block, x, rows, z, 2 * OUTPUTS);
  }

  void finish(const Job& job, const Tile& t, int64_t block) const {
    const Weight w = c.weight.expert(job.expert);
    float z[MAX_TILE * 2 * OUTPUTS], other[MAX_TILE * 2 * OUTPUTS];
    const int64_t start = block * OUTPUTS, count = std::min<int64_t>(OUTPUTS, c.n() - start);
    outputs(w, start, t, z);
    const int64_t skip = c.gated ? outputs(w, c.n() + start, t, other) : 0;
    const int64_t bias = job.expert * w.rows + start;
    for (int r = 0; r < t.rows; r++) {
      const int64_t row = order[size_t(t.first + r)];
      for (int64_t i = 0; i < count; i += LANES) {
        const int64_t left = count - i;
        F32 v = activate(biased(load(z + r * 2 * OUTPUTS + i), bias + i, left), c.activation);
        if (c.gated) {
          const F32 up = biased(load(other + r * 2 * OUTPUTS + skip + i), bias + c.n() + i, left);
          v = multiply(v, other_half(up, c.activation));
        }
        if (c.residual)
          v = add(v, load_some(c.residual, c.type, row * c.residual_stride + start + i, left));
        store_some(c.y, c.type, row * c.n() + start + i, v, left);
      }
    }
  }

  F32 biased(F32 z, int64_t at, int64_t left) const {
    return c.bias ? add(z, load_some(c.bias, c.bias_type, at, left)) : z;
  }
};

}  // namespace

bool multiply(const Call& call) { return Matmul(call).run(); }

// 0, or 1 where the routing names a row or an expert that there is not; see without_exceptions.
extern "C" EXPORT int64_t fqcompile_matmul(const char* bytes) {
  Call call;
  memcpy(&call, bytes, sizeof(call));
  return without_exceptions([&] { return multiply(call) ? 0 : 1; });
}

void dequantize(const Panel& panel) {
  const Levels levels(panel.weight.values);
  const Way way = way_of(panel.weight, levels, panel.type);
  in_parallel(panel.count, panel.one_thread, [&](int64_t i) {
    char* to = (char*)panel.to + i * OUTPUTS * bytes_of(panel.type);
    way.dequantize(panel.weight, levels, panel.first + i, panel.type, to, panel.stride);
  });
}

void dequantize(const Picked& picked) {
  const Levels levels(picked.weight.values);
  const int64_t k = picked.weight.k;
  in_parallel(picked.count, picked.one_thread || picked.count * k < (1 << 15), [&](int64_t i) {
    thread_local std::vector<float> row;
    row.resize(std::max(row.size(), size_t(k + LANES)));
    dequantize_row(picked.weight, levels, picked.ids[i], row.data());
    for (int64_t at = 0; at < k; at += LANES) store_some(picked.to, picked.type, i * k + at, load(&row[size_t(at)]), k - at);
  });
}

extern "C" EXPORT int64_t fqcompile_dequantize(const char* bytes) {
  Panel panel;
  memcpy(&panel, bytes, sizeof(panel));
  return without_exceptions([&] { return dequantize(panel), 0; });
}

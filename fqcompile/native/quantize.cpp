// Scales and codes of a matrix: what quant/scale_search.py and quant/affine.py say with PyTorch's
// operations, bit for bit. Every number is made by the same operations in the same order:
//
//   errors of candidates   weights one after the other in segments of SEGMENT, by fused multiply-add;
//                          then segments by halves
//   all other sums         by halves: x[i] += x[i + half]
//   all else               one operation at a time: the build says -ffp-contract=off
//
// A task is a row, so that neither threads nor other rows change a bit.
#include <cmath>
#include <vector>

#include "parallel.h"
#include "rounding.h"

namespace {

constexpr int64_t SEGMENT = 32;
constexpr float LEAST_PIVOT = 0x1p-110f;

// The dense weight [rows][k], and the levels of its codes.
struct Matrix {
  const void* w;
  DType type;
  int64_t rows, k, group, bits;
  const float* values;  // of the codes -8 to 7; null where codes are integers

  int64_t groups() const { return (k + group - 1) / group; }
  int64_t padded_k() const { return groups() * group; }
};

// What Python hands over; the fields are described in native_quantizer.py.
struct Search {
  Matrix matrix;
  const float* h;         // [groups * group], or null
  const double* factors;  // [groups], or null
  const float *table, *steps;
  int64_t bins, candidates, refits;
  float* scales;   // [rows][groups], or null
  double* errors;  // [rows], or null
  int64_t one_thread;
};

struct Encode {
  Matrix matrix;
  const void* scales;  // [rows][groups]
  DType scale_type;
  uint8_t* codes;      // [rows][row_bytes]
  int64_t row_bytes;
  double* norms;       // [rows][2]
  int64_t one_thread;
};

int64_t first_half(int64_t count) {
  int64_t half = 1;
  while (2 * half < count) half *= 2;
  return half;
}

// By halves, the first of which is the larger power of two; x is lost.
float halving_sum(float* x, int64_t count) {
  for (int64_t half = first_half(count); half >= LANES; half /= 2) {
    const int64_t second = std::min(count - half, half);
    for (int64_t i = 0; i < second; i += LANES)
      store(x + i, add(load(x + i), load_some(x + half, FP32, i, second - i)));
    count = half;
  }
  return sum_of_lanes(load_some(x, FP32, 0, count));
}

template <class T>
T halving_sum(T* x, int64_t count, int64_t width = 1) {
  for (int64_t half = first_half(count); half >= 1; half /= 2) {
    const int64_t second = std::min(count - half, half) * width;
    for (int64_t i = 0; i < second; i++) x[i] += x[i + half * width];
    count = half;
  }
  return x[0];
}

// What one thread makes of a row.
struct Scratch {
  std::vector<float> w, u, first, second, pivots, steps, sums;
  std::vector<int32_t> bins;
  std::vector<uint8_t> codes;
  std::vector<double> errors, squares;

  static Scratch& of(const Matrix& m, int64_t candidates) {
    thread_local Scratch own;
    const auto grow = [](auto& vector, int64_t size) {
      if (vector.size() < size_t(size)) vector.resize(size_t(size));
    };
    const int64_t row = m.padded_k() + LANES;
    for (auto* vector : {&own.w, &own.u, &own.first, &own.second, &own.pivots, &own.steps}) grow(*vector, row);
    grow(own.sums, (m.group + SEGMENT - 1) / SEGMENT * candidates);
    grow(own.bins, row);
    grow(own.codes, row);
    for (auto* vector : {&own.errors, &own.squares}) grow(*vector, row);
    return own;
  }
};

// Row r as fp32, with zeros where h is zero and up to the end of the last group.
void read_row(const Matrix& m, int64_t r, const float* h, float* to) {
  const char* from = (const char*)m.w + r * m.k * bytes_of(m.type);
  for (int64_t k = 0; k < m.k; k += LANES) {
    const F32 w = load_some(from, m.type, k, m.k - k);
    store(to + k, h ? where_positive(load_some(h, FP32, k, m.k - k), w) : w);
  }
  std::fill(to + m.k, to + m.padded_k(), 0.0f);
}

// The weight of largest magnitude; of a tie, the negative.
float signed_extreme(const float* w, int64_t count) {
  F32 low = zero(), high = zero();
  for (int64_t i = 0; i < count; i += LANES) {
    const F32 v = load_some(w, FP32, i, count - i);
    low = least(v, low);
    high = most(v, high);
  }
  const float lowest = least_lane(low), highest = most_lane(high);
  return -lowest >= highest ? lowest : highest;
}

// Steps and errors of one row; each step of the way for all groups, so that they overlap.
template <class Levels>
class RowSearch {
 public:
  RowSearch(const Search& search, const Levels& levels_, int64_t r)
      : s(search), m(search.matrix), levels(levels_), to(Scratch::of(m, s.candidates)) {
    read_row(m, r, s.h, to.w.data());
    each_group([&](int64_t g) { divide_by_pivot(g); });
    each_group([&](int64_t g) { to.steps[size_t(g)] = best_candidate(g); });
    if (s.errors) {
      each_group([&](int64_t g) { to.errors[size_t(g)] = squared_error(g); });
      s.errors[r] = halving_sum(to.errors.data(), m.groups(), 1);
    }
    for (int64_t i = 0; i < s.refits; i++) each_group([&](int64_t g) { refit(g); });
    if (s.scales) each_group([&](int64_t g) { s.scales[r * m.groups() + g] = scale(g); });
  }

 private:
  const Search& s;
  const Matrix& m;
  const Levels& levels;
  Scratch& to;

  template <class Task>
  void each_group(const Task& task) const {
    for (int64_t g = 0; g < m.groups(); g++) task(g);
  }

  const float* u(int64_t g) const { return to.u.data() + g * m.group; }
  const float* h(int64_t g) const { return s.h ? s.h + g * m.group : nullptr; }

  // u = w / pivot, and where the row of its bin begins in the table.
  void divide_by_pivot(int64_t g) const {
    const float* w = to.w.data() + g * m.group;
    const float extreme = signed_extreme(w, m.group);
    const float pivot = std::fabs(extreme) < LEAST_PIVOT ? LEAST_PIVOT : -extreme;
    to.pivots[size_t(g)] = extreme == 0 ? 0 : pivot;
    const float half = float(s.bins) / 2;
    for (int64_t i = 0; i < m.group; i += LANES) {
      const F32 u = divide(load(w + i), splat(pivot));
      const U32 bin = clamped(truncated(add(multiply(u, splat(half)), splat(half + 0.5f))), 0, int(s.bins));
      const U32 at = multiply_bits(bin, splat_bits(uint32_t(s.candidates)));
      store(&to.u[size_t(g * m.group + i)], u);
      memcpy(&to.bins[size_t(g * m.group + i)], &at, sizeof(at));
    }
  }

  float best_candidate(int64_t g) const {
    switch (s.candidates / 16) {
      case 1: return best_of<16>(g);
      case 2: return best_of<32>(g);
      default: return best_of<48>(g);
    }
  }

  template <int CANDIDATES>
  float best_of(int64_t g) const {
    constexpr int VECTORS = CANDIDATES / LANES;
    float* sums = to.sums.data();
    for (int64_t start = 0; start < m.group; start += SEGMENT)
      s.h ? segment<CANDIDATES, true>(g, start, sums + start / SEGMENT * CANDIDATES)
          : segment<CANDIDATES, false>(g, start, sums + start / SEGMENT * CANDIDATES);
    halving_sum(sums, (m.group + SEGMENT - 1) / SEGMENT, CANDIDATES);
    F32 low = load(sums);
    for (int v = 1; v < VECTORS; v++) low = least(load(sums + v * LANES), low);
    low = splat(least_lane(low));
    for (int v = 0; v < VECTORS; v++)
      if (const uint32_t found = equal_lanes(load(sums + v * LANES), low))
        return s.steps[v * LANES + __builtin_ctz(found)];
    return s.steps[0];  // some are NaN, as a weight may become while it is read
  }

  template <int CANDIDATES, bool WEIGHTED>
  void segment(int64_t g, int64_t start, float* sums) const {
    constexpr int VECTORS = CANDIDATES / LANES;
    F32 sum[VECTORS];
    for (F32& v : sum) v = zero();
    const int64_t count = std::min(SEGMENT, m.group - start);
    const int32_t* at = to.bins.data() + g * m.group + start;
    [[maybe_unused]] const float* weights = h(g) + start;
    for (int64_t k = 0; k < count; k++) {
      const float* row = s.table + at[k];
#pragma GCC unroll 6
      for (int v = 0; v < VECTORS; v++) {
        const F32 error = load(row + v * LANES);
        sum[v] = WEIGHTED ? fma(splat(weights[k]), error, sum[v]) : add(sum[v], error);
      }
    }
    for (int v = 0; v < VECTORS; v++) store(sums + v * LANES, sum[v]);
  }

  F32 weighted(F32 v, int64_t g, int64_t i) const {
    return s.h ? multiply(v, load_some(h(g), FP32, i, m.group - i)) : v;
  }

  // sum h (level * step - u)^2 in units of w
  double squared_error(int64_t g) const {
    const F32 step = splat(to.steps[size_t(g)]), inverse = divide(splat(1.0f), step);
    float* squares = to.first.data();
    for (int64_t i = 0; i < m.group; i += LANES) {
      const F32 exact = load(u(g) + i);
      const F32 off = subtract(multiply(levels.nearest_level(multiply(exact, inverse)), step), exact);
      store(squares + i, weighted(multiply(off, off), g, i));
    }
    const double error = halving_sum(squares, m.group), pivot = to.pivots[size_t(g)];
    return error * (pivot * pivot) * (s.factors ? s.factors[g] : 1.0);
  }

  // The best step for the levels that this one gives: sum h u level / sum h level^2
  void refit(int64_t g) const {
    const F32 inverse = divide(splat(1.0f), splat(to.steps[size_t(g)]));
    float *dots = to.first.data(), *energies = to.second.data();
    for (int64_t i = 0; i < m.group; i += LANES) {
      const F32 exact = load(u(g) + i);
      const F32 level = levels.nearest_level(multiply(exact, inverse)), counted = weighted(level, g, i);
      store(dots + i, multiply(exact, counted));
      store(energies + i, multiply(counted, level));
    }
    const float dot = halving_sum(dots, m.group), energy = halving_sum(energies, m.group);
    if (energy > 0) to.steps[size_t(g)] = dot / energy;
  }

  float scale(int64_t g) const {
    const float pivot = to.pivots[size_t(g)];
    return pivot == 0 ? 1.0f : to.steps[size_t(g)] * pivot;
  }
};

// The codes of one row, and the squared norms of what they are off and of the weights.
template <class Levels>
void encode_row(const Encode& e, const Levels& levels, int64_t r) {
  const Matrix& m = e.matrix;
  Scratch& to = Scratch::of(m, 0);
  read_row(m, r, nullptr, to.w.data());
  for (int64_t g = 0; g < m.groups(); g++) {
    float scale[LANES];
    store(scale, load_some(e.scales, e.scale_type, r * m.groups() + g, 1));
    for (int64_t k = g * m.group; k < (g + 1) * m.group; k += LANES) {
      const U32 index = levels.index(divide(load(&to.w[size_t(k)]), splat(scale[0])));
      store_bytes(&to.codes[size_t(k)], index);
      store(&to.u[size_t(k)], multiply(levels.level(index), splat(scale[0])));
    }
  }
  for (size_t k = 0; k < size_t(m.k); k++) {
    const double exact = to.w[k], off = exact - double(to.u[k]);
    to.errors[k] = off * off;
    to.squares[k] = exact * exact;
  }
  e.norms[2 * r] = halving_sum(to.errors.data(), m.k, 1);
  e.norms[2 * r + 1] = halving_sum(to.squares.data(), m.k, 1);
  uint8_t* codes = e.codes + r * e.row_bytes;
  if (m.bits == 8) {
    for (int64_t k = 0; k < m.k; k++) codes[k] = uint8_t(to.codes[size_t(k)] ^ 0x80);
  } else {
    to.codes[size_t(m.k)] = 8;  // code 0 fills up the last byte
    for (int64_t j = 0; j < e.row_bytes; j++)
      codes[j] = uint8_t(to.codes[size_t(2 * j)] | to.codes[size_t(2 * j + 1)] << 4);
  }
}

// task(levels, row) for every row
template <class Task>
void each_row(const Matrix& m, bool one_thread, const Task& task) {
  const int64_t run = std::max<int64_t>(1, (1 << 15) / m.k);
  if (m.values) {
    const Sixteen levels(m.bits, m.values);
    return in_parallel(m.rows, one_thread, [&](int64_t r) { task(levels, r); }, run);
  }
  const Integers levels(m.bits, nullptr);
  in_parallel(m.rows, one_thread, [&](int64_t r) { task(levels, r); }, run);
}

}  // namespace

// Scales of least sum h (w - ŵ)^2, before they are rounded, and that sum for each row's candidates.
extern "C" EXPORT void fqcompile_search(const char* bytes) {
  Search search;
  memcpy(&search, bytes, sizeof(search));
  each_row(search.matrix, search.one_thread, [&](const auto& levels, int64_t r) {
    RowSearch<std::decay_t<decltype(levels)>>(search, levels, r);
  });
}

// Codes in the plain layout.
extern "C" EXPORT void fqcompile_encode(const char* bytes) {
  Encode encode;
  memcpy(&encode, bytes, sizeof(encode));
  each_row(encode.matrix, encode.one_thread,
           [&](const auto& levels, int64_t r) { encode_row(encode, levels, r); });
}

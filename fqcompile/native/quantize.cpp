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
#include "sums.h"

namespace {

constexpr int64_t SEGMENT = 32;
constexpr int LOG2_CANDIDATES = 5, CANDIDATES = 1 << LOG2_CANDIDATES;  // unless there is one alone
constexpr float LEAST_PIVOT = 0x1p-110f;

// The dense weight [rows][k], and the levels of its codes.
struct Matrix {
  const void* w;
  DType type;
  int64_t rows, k, group, bits;
  const float* values;  // of the codes -8 to 7; null where codes are integers

  int64_t groups() const { return (k + group - 1) / group; }
  int64_t padded_k() const { return groups() * group; }
  int64_t row_buffer() const { return std::max(padded_k(), power_of_two_from(k)) + LANES; }
};

// What Python hands over, see native_quantizer.py. Any of h to totals may be null: h are ones then, and
// results are not made.
struct Search {
  Matrix matrix;
  const float* h;         // [groups][group]
  const double* factors;  // [groups]: times h they are
  const double* exact_h;  // [the next power of two from k, at least 8]
  float* scales;          // [rows][groups]
  double *errors, *totals;  // [rows]
  const float* table;       // [bins + 1][candidates]
  const float* steps;       // [candidates]
  int64_t bins, candidates, refits, one_thread;
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

// What one thread makes of a row.
struct Scratch {
  std::vector<float> w, u, first, second, pivots, steps, sums;
  std::vector<int32_t> bins;
  std::vector<uint8_t> codes;
  std::vector<double> errors, partial;

  static Scratch& of(const Matrix& m) {
    thread_local Scratch own;
    const auto grow = [](auto& vector, int64_t size) {
      if (vector.size() < size_t(size)) vector.resize(size_t(size));
    };
    const int64_t row = m.row_buffer();
    for (auto* vector : {&own.w, &own.u, &own.first, &own.second, &own.pivots, &own.steps}) grow(*vector, row);
    grow(own.sums, m.groups() * ((m.group + SEGMENT - 1) / SEGMENT) * CANDIDATES);
    grow(own.bins, row);
    grow(own.codes, row);
    grow(own.errors, m.groups());
    grow(own.partial, power_of_two_from(m.k) / 8);
    return own;
  }
};

// Row r as fp32, with zeros where h is zero and from its end on.
void read_row(const Matrix& m, int64_t r, const float* h, std::vector<float>& row) {
  float* to = row.data();
  const char* from = (const char*)m.w + r * m.k * bytes_of(m.type);
  for (int64_t k = 0; k < m.k; k += LANES) {
    const F32 w = load_some(from, m.type, k, m.k - k);
    store(to + k, h ? where_positive(load_some(h, FP32, k, m.k - k), w) : w);
  }
  std::fill(to + m.k, to + m.row_buffer(), 0.0f);
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

INLINE F32 weighted(F32 v, const float* h, int64_t i, int64_t count) {
  return h ? multiply(v, load_some(h, FP32, i, count - i)) : v;
}

// Loops take levels by value: what they store might be a part of what others can see.

// sum h (level * step - u)^2
template <class Levels>
float squared_error_of(const Levels levels, const float* u, const float* h, int64_t count, float step,
                       float* squares) {
  const F32 steps = splat(step), inverse = splat(1 / step);
  for (int64_t i = 0; i < count; i += LANES) {
    const F32 exact = load(u + i);
    const F32 off = subtract(multiply(levels.nearest_level(multiply(exact, inverse)), steps), exact);
    store(squares + i, weighted(multiply(off, off), h, i, count));
  }
  return halving_sum(squares, count);
}

// The best step for the levels that this one gives: sum h u level / sum h level^2
template <class Levels>
float refit_of(const Levels levels, const float* u, const float* h, int64_t count, float step, float* dots,
               float* energies) {
  const F32 inverse = splat(1 / step);
  for (int64_t i = 0; i < count; i += LANES) {
    const F32 exact = load(u + i);
    const F32 level = levels.nearest_level(multiply(exact, inverse));
    const F32 counted = weighted(level, h, i, count);
    store(dots + i, multiply(exact, counted));
    store(energies + i, multiply(counted, level));
  }
  const float dot = halving_sum(dots, count), energy = halving_sum(energies, count);
  return energy > 0 ? dot / energy : step;
}

// Steps and errors of one row; each step of the way for all groups, so that they overlap.
template <class Levels>
class RowSearch {
 public:
  RowSearch(const Search& search, const Levels& levels_, int64_t r)
      : s(search), m(search.matrix), levels(levels_), to(Scratch::of(m)) {
    read_row(m, r, s.h, to.w);
    if (s.totals) s.totals[r] = total();
    each_group([&](int64_t g) { divide_by_pivot(g); });
    if (s.candidates > 1) sum_segments();
    each_group([&](int64_t g) { to.steps[size_t(g)] = s.candidates > 1 ? best_candidate(g) : s.steps[0]; });
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

  double total() const {
    const float* w = to.w.data();
    const double* h = s.exact_h;
    const auto square = [w](int64_t k) { return double(w[k]) * double(w[k]); };
    if (!h) return halving_sum_of(m.k, to.partial.data(), square);
    return halving_sum_of(m.k, to.partial.data(), [=](int64_t k) { return square(k) * h[k]; });
  }

  // u = w / pivot, and where the row of its bin begins in the table.
  void divide_by_pivot(int64_t g) const {
    const float* w = to.w.data() + g * m.group;
    const float extreme = signed_extreme(w, m.group);
    const float pivot = std::fabs(extreme) < LEAST_PIVOT ? LEAST_PIVOT : -extreme;
    to.pivots[size_t(g)] = extreme == 0 ? 0 : pivot;
    const float half = float(s.bins) / 2;
    float* to_u = to.u.data() + g * m.group;
    int32_t* to_bins = to.bins.data() + g * m.group;
    const int64_t group = m.group;
    for (int64_t i = 0; i < group; i += LANES) {
      const F32 u = divide(load(w + i), splat(pivot));
      const U32 bin = clamped(truncated(add(multiply(u, splat(half)), splat(half + 0.5f))), 0, int(s.bins));
      const U32 at = left(bin, LOG2_CANDIDATES);
      store(to_u + i, u);
      memcpy(to_bins + i, &at, sizeof(at));
    }
  }

  int64_t segments() const { return (m.group + SEGMENT - 1) / SEGMENT; }  // of a group

  // The sums of all candidates for all segments of the row, two segments at a time: the additions of one
  // wait for each other.
  void sum_segments() const {
    const int64_t per_group = segments(), count = m.groups() * per_group;
    const auto start = [&](int64_t i) { return i / per_group * m.group + i % per_group * SEGMENT; };
    const auto length = [&](int64_t i) { return std::min(SEGMENT, m.group - i % per_group * SEGMENT); };
    for (int64_t i = 0; i < count; i++) {
      float* sums = to.sums.data() + i * CANDIDATES;
      if (i + 1 == count || length(i) != length(i + 1)) {
        s.h ? sum<1, true>(start(i), 0, length(i), sums) : sum<1, false>(start(i), 0, length(i), sums);
        continue;
      }
      const int64_t first = start(i), second = start(++i);
      s.h ? sum<2, true>(first, second, length(i), sums) : sum<2, false>(first, second, length(i), sums);
    }
  }

  template <int SEGMENTS, bool WEIGHTED>
  void sum(int64_t first, int64_t second, int64_t count, float* sums) const {
    constexpr int VECTORS = CANDIDATES / LANES;
    const int64_t starts[2] = {first, second};
    F32 sum[SEGMENTS][VECTORS];
    for (auto& segment : sum)
      for (F32& v : segment) v = zero();
    for (int64_t k = 0; k < count; k++)
#pragma GCC unroll 2
      for (int i = 0; i < SEGMENTS; i++) {
        const int64_t at = starts[i] + k;
        const float* row = s.table + to.bins[size_t(at)];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
          const F32 error = load(row + v * LANES);
          sum[i][v] = WEIGHTED ? fma(splat(s.h[at]), error, sum[i][v]) : add(sum[i][v], error);
        }
      }
    for (int i = 0; i < SEGMENTS; i++)
      for (int v = 0; v < VECTORS; v++) store(sums + i * CANDIDATES + v * LANES, sum[i][v]);
  }

  // The step of least error, the first of several.
  float best_candidate(int64_t g) const {
    float* sums = to.sums.data() + g * segments() * CANDIDATES;
    halving_sum(sums, segments(), CANDIDATES);
    F32 low = load(sums);
    for (int i = LANES; i < CANDIDATES; i += LANES) low = least(load(sums + i), low);
    low = splat(least_lane(low));
    for (int i = 0; i < CANDIDATES; i += LANES)
      if (const uint32_t found = equal_lanes(load(sums + i), low)) return s.steps[i + __builtin_ctz(found)];
    return s.steps[0];  // some are NaN, as a weight may become while it is read
  }

  // sum h (level * step - u)^2 in units of w
  double squared_error(int64_t g) const {
    const double error = squared_error_of(levels, u(g), h(g), m.group, to.steps[size_t(g)], to.first.data());
    const double pivot = to.pivots[size_t(g)];
    return error * (pivot * pivot) * (s.factors ? s.factors[g] : 1.0);
  }

  void refit(int64_t g) const {
    float& step = to.steps[size_t(g)];
    step = refit_of(levels, u(g), h(g), m.group, step, to.first.data(), to.second.data());
  }

  float scale(int64_t g) const {
    const float pivot = to.pivots[size_t(g)];
    return pivot == 0 ? 1.0f : to.steps[size_t(g)] * pivot;
  }
};

// Indices of a row as the plain layout has its codes.
void pack(const Matrix& m, uint8_t* indices, int64_t bytes, uint8_t* to) {
  if (m.bits == 8) {
    for (int64_t k = 0; k < bytes; k++) to[k] = uint8_t(indices[k] ^ 0x80);
  } else {
    indices[m.k] = 8;  // code 0 fills up the last byte
    for (int64_t j = 0; j < bytes; j++) to[j] = uint8_t(indices[2 * j] | indices[2 * j + 1] << 4);
  }
}

template <class Levels>
void encode_group(const Levels levels, const float* w, int64_t count, float scale, uint8_t* indices,
                  float* w_hat) {
  for (int64_t k = 0; k < count; k += LANES) {
    const U32 index = levels.index(divide(load(w + k), splat(scale)));
    store_bytes(indices + k, index);
    store(w_hat + k, multiply(levels.level(index), splat(scale)));
  }
}

// The codes of one row, and the squared norms of what they are off and of the weights.
template <class Levels>
void encode_row(const Encode& e, const Levels& levels, int64_t r) {
  const Matrix& m = e.matrix;
  Scratch& to = Scratch::of(m);
  read_row(m, r, nullptr, to.w);
  for (int64_t g = 0; g < m.groups(); g++) {
    float scale[LANES];
    store(scale, load_some(e.scales, e.scale_type, r * m.groups() + g, 1));
    encode_group(levels, to.w.data() + g * m.group, m.group, scale[0], to.codes.data() + g * m.group,
                 to.u.data() + g * m.group);
  }
  std::fill(to.u.data() + m.k, to.u.data() + m.row_buffer(), 0.0f);
  const float *w = to.w.data(), *w_hat = to.u.data();
  const auto square = [](double v) { return v * v; };
  e.norms[2 * r] = halving_sum_of(m.k, to.partial.data(),
                                  [=](int64_t k) { return square(double(w[k]) - double(w_hat[k])); });
  e.norms[2 * r + 1] = halving_sum_of(m.k, to.partial.data(), [=](int64_t k) { return square(w[k]); });
  pack(m, to.codes.data(), e.row_bytes, e.codes + r * e.row_bytes);
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
extern "C" EXPORT int64_t fqcompile_search(const char* bytes) {
  Search search;
  memcpy(&search, bytes, sizeof(search));
  const auto row = [&](const auto& levels, int64_t r) {
    RowSearch<std::decay_t<decltype(levels)>>(search, levels, r);
  };
  return without_exceptions([&] { return each_row(search.matrix, search.one_thread, row), 0; });
}

// Codes in the plain layout.
extern "C" EXPORT int64_t fqcompile_encode(const char* bytes) {
  Encode encode;
  memcpy(&encode, bytes, sizeof(encode));
  const auto row = [&](const auto& levels, int64_t r) { encode_row(encode, levels, r); };
  return without_exceptions([&] { return each_row(encode.matrix, encode.one_thread, row), 0; });
}

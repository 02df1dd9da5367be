// One matmul: where its operands lie, and what they are.
#pragma once
#include "types.h"

constexpr int OUTPUTS = 64, STEP = 8;  // a block's outputs; K is rounded up to whole steps

struct Weight {
  const uint32_t* words;
  const void* scales;
  DType scale_type;
  const float* values;  // of the codes -8 to 7; null where codes are integers
  int64_t bits, group, rows, k;

  int64_t padded_k() const { return (k + STEP - 1) / STEP * STEP; }
  int64_t groups() const { return (k + group - 1) / group; }
  int64_t blocks() const { return (rows + OUTPUTS - 1) / OUTPUTS; }
  int64_t block_words() const { return padded_k() * bits / 32 * OUTPUTS; }
  int64_t block_scales() const { return groups() * OUTPUTS; }
  bool odd_groups() const { return group % STEP && group < k; }  // a word may meet several groups
  Weight expert(int64_t e) const {
    Weight one = *this;
    one.words += e * blocks() * block_words();
    one.scales = (const char*)scales + e * blocks() * block_scales() * bytes_of(scale_type);
    return one;
  }
};

// A matmul, as Python hands it over too: each field has eight bytes.
struct Call {
  Weight weight;
  const void* x;
  int64_t x_stride;
  DType type;
  int64_t m;
  const void* bias;
  DType bias_type;
  const void* residual;
  int64_t residual_stride;
  void* y;
  Activation activation;
  int64_t gated, experts;
  const void* routing;
  int64_t routing_is_ids, routing_bytes, one_thread;

  int64_t n() const { return gated ? weight.rows / 2 : weight.rows; }
};

// y = act(x @ ŵᵀ + bias) + residual; false where the routing names a row or an expert that there is not.
bool multiply(const Call& call);

// ŵᵀ of `count` blocks from `first` on, one beside the other.
struct Panel {
  Weight weight;
  int64_t first, count;
  DType type;
  void* to;
  int64_t stride, one_thread;
};

void dequantize(const Panel& panel);

// ŵ [count][k] of the rows that `ids` name, each in [0, rows).
struct Picked {
  Weight weight;
  const int64_t* ids;
  int64_t count;
  DType type;
  void* to;
  int64_t one_thread;
};

void dequantize(const Picked& picked);

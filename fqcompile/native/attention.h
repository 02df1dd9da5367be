// One attention: where its operands lie, and what they are.
#pragma once
#include "types.h"

enum MaskType : int64_t { BOOL = 3 };  // or one of DType

// Where row r of head h of batch b begins.
struct Rows {
  const char* data;
  int64_t batch, head, row;  // strides in bytes

  const char* at(int64_t b, int64_t h, int64_t r) const { return data + b * batch + h * head + r * row; }
};

// As Python hands it over too: each field has eight bytes.
struct AttentionCall {
  Rows q, k, v, mask;  // numbers of a row lie side by side but in the mask, which may be null
  int64_t mask_key;    // its stride from key to key, in bytes
  int64_t mask_type;
  Rows sinks;  // a score more of each row, of which no value follows; may be null
  int64_t sinks_type;
  void* out;           // [batch, queries, heads, v_width]
  DType type;
  int64_t batch, heads, kv_heads, queries, keys, width, v_width;
  int64_t causal, nan_if_hidden, one_thread;
  double scale, softcap;  // softcap is 0 where there is none

  int64_t rows() const { return heads / kv_heads * queries; }  // of q that meet one head of k
};

// out = softmax(scale q kᵀ + mask) v
void attend(const AttentionCall& call);

// What operator.cpp and the kernels both name, without an instruction: operator.cpp is compiled for any
// processor, so that it can say that this one is not the one that the kernels are compiled for.
#pragma once
#include <cstdint>

#define EXPORT __attribute__((visibility("default")))

enum DType : int64_t { FP32 = 0, BF16 = 1, FP16 = 2 };

static inline int64_t bytes_of(DType type) { return type == FP32 ? 4 : 2; }

// The numbers are those of ACTIVATIONS in kernels/epilogue.py.
enum Activation : int64_t { NONE = 0, RELU = 1, GELU = 2, GELU_TANH = 3, SILU = 4, SWIGLU_OAI = 5 };

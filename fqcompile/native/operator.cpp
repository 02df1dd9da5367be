// fqcompile::matmul, fqcompile::matmul.inference and fqcompile::attention, called by PyTorch's dispatcher
// with no Python between: 4 us a call, of which an operator that does nothing takes 3.5. By Python it takes
// 10, and more where weights have pushed Python out of the caches.
//
// This comes before the implementation for CPUs, which is Python's (kernels/op.py, cpu/attention.py). What
// is not usual is left to that one, unchanged: other kernels and layouts, and wrong arguments, of which it
// says what is wrong.
#include <ATen/EmptyTensor.h>
#include <pthread.h>
#include <torch/library.h>

#include <optional>

#include "attention.h"
#include "call.h"

namespace {

// As `serve` of kernels/cpu/stream.py hands it over.
struct Settings {
  const float* normal;  // the values of the codes -8 to 7 with normal levels
  int64_t most_bf16_rows;  // of bf16 and one matrix; for more, Python's way is faster
  int64_t forked;  // whether this is a child of os.fork, where libgomp would wait for the parent's threads
} settings;

// The schema's order.
enum Place {
  X, QWEIGHT, SCALE, BIAS, RESIDUAL, BITS, LEVELS, GROUP_SIZE, N, K, ACTIVATION, GATED, KERNEL, OFFSETS, IDS,
  ZERO_REST, PLACES
};

constexpr const char* ACTIVATIONS[] = {"none", "relu", "gelu", "gelu_tanh", "silu", "swiglu_oai"};

bool type_of(const at::Tensor& t, DType& type) {
  switch (t.scalar_type()) {
    case at::kFloat: type = FP32; return true;
    case at::kBFloat16: type = BF16; return true;
    case at::kHalf: type = FP16; return true;
    default: return false;
  }
}

bool is_dense(const at::Tensor& t) { return t.key_set().has_all(c10::DispatchKeySet(c10::DispatchKey::CPU)); }

bool is(const at::Tensor& t, at::IntArrayRef sizes) {
  return is_dense(t) && t.sizes() == sizes && t.is_contiguous();
}

// A call that is read from the stack of arguments, if it is a usual one.
class Usual {
 public:
  Call call{};
  at::DimVector sizes;  // of y
  at::ScalarType type{};

  bool read(const c10::IValue* a) {
    return a[KERNEL].toStringRef() == "x86_stream" && !a[ZERO_REST].toBool() && read_form(a) && read_x(a[X].toTensor()) &&
           read_routing(a) && read_weight(a[QWEIGHT].toTensor(), a[SCALE].toTensor()) && read_bias(a[BIAS]) &&
           read_residual(a[RESIDUAL]);
  }

 private:
  at::DimVector stack;  // [experts] or []

  bool read_form(const c10::IValue* a) {
    Weight& w = call.weight;
    const int64_t n = a[N].toInt(), group = a[GROUP_SIZE].toInt();
    w.bits = a[BITS].toInt();
    w.k = a[K].toInt();
    call.gated = a[GATED].toBool();
    w.rows = call.gated ? 2 * n : n;
    if (n <= 0 || w.k <= 0 || group <= 0 || (w.bits != 4 && w.bits != 8)) return false;
    w.group = std::min(group, w.k);
    const std::string& levels = a[LEVELS].toStringRef();
    if (levels == "normal" && w.bits == 4) w.values = settings.normal;
    else if (levels != "uniform") return false;
    const std::string& name = a[ACTIVATION].toStringRef();
    for (const char* known : ACTIVATIONS) {
      if (name == known) return true;
      call.activation = Activation(call.activation + 1);
    }
    return false;
  }

  bool read_x(const at::Tensor& x) {
    const int64_t k = call.weight.k;
    if (!is_dense(x) || !x.dim() || x.sizes().back() != k || !x.numel() || !type_of(x, call.type)) return false;
    const bool rows = x.dim() == 2 && x.stride(1) == 1;
    if (!rows && !x.is_contiguous()) return false;
    call.x = x.const_data_ptr();
    call.x_stride = rows ? x.stride(0) : k;
    call.m = x.numel() / k;
    type = x.scalar_type();
    sizes.assign(x.sizes().begin(), x.sizes().end());
    sizes.back() = call.n();
    return true;
  }

  bool read_routing(const c10::IValue* a) {
    call.experts = 1;
    if (a[OFFSETS].isNone() && a[IDS].isNone()) return call.type != BF16 || call.m <= settings.most_bf16_rows;
    if (!a[OFFSETS].isNone() && !a[IDS].isNone()) return false;
    call.routing_is_ids = a[OFFSETS].isNone();
    const at::Tensor& told = a[call.routing_is_ids ? IDS : OFFSETS].toTensor();
    const at::Tensor& qweight = a[QWEIGHT].toTensor();
    if (qweight.dim() != 4 || sizes.size() != 2) return false;
    call.experts = qweight.size(0);
    stack.assign(1, call.experts);
    if (told.scalar_type() != at::kInt && told.scalar_type() != at::kLong) return false;
    call.routing = is(told, {call.routing_is_ids ? call.m : call.experts}) ? told.const_data_ptr() : nullptr;
    call.routing_bytes = int64_t(told.element_size());
    return call.experts > 0 && call.routing;
  }

  bool read_weight(const at::Tensor& qweight, const at::Tensor& scale) {
    Weight& w = call.weight;
    at::DimVector words(stack), scales(stack);
    words.append({w.blocks(), w.padded_k() * w.bits / 32, OUTPUTS});
    scales.append({w.blocks(), w.groups(), OUTPUTS});
    if (qweight.scalar_type() != at::kInt || !is(qweight, words) || !is(scale, scales)) return false;
    w.words = (const uint32_t*)qweight.const_data_ptr();
    w.scales = scale.const_data_ptr();
    return type_of(scale, w.scale_type);
  }

  bool read_bias(const c10::IValue& given) {
    if (given.isNone()) return true;
    at::DimVector biases(stack);
    biases.push_back(call.weight.rows);
    const at::Tensor& bias = given.toTensor();
    call.bias = bias.scalar_type() == type && is(bias, biases) ? bias.const_data_ptr() : nullptr;
    call.bias_type = call.type;
    return call.bias;
  }

  bool read_residual(const c10::IValue& given) {
    if (given.isNone()) return true;
    const at::Tensor& residual = given.toTensor();
    const bool fits = !call.routing && residual.scalar_type() == type && is(residual, sizes);
    call.residual = fits ? residual.const_data_ptr() : nullptr;
    call.residual_stride = call.n();
    return call.residual;
  }
};

void matmul(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  Usual usual;
  if (usual.read(stack->data() + stack->size() - PLACES)) {
    at::Tensor y = at::detail::empty_cpu(usual.sizes, usual.type);
    usual.call.y = y.mutable_data_ptr();
    usual.call.one_thread = settings.forked;
    if (multiply(usual.call)) {
      torch::jit::drop(*stack, PLACES);
      stack->emplace_back(std::move(y));
      return;
    }
  }
  op.redispatchBoxed(keys.remove(c10::DispatchKey::BackendSelect), stack);
}

// The same for fqcompile::attention.
enum AttentionPlace { Q, KEYS, VALUES, MASK, SINKS, SCALE_OF_SCORES, SOFTCAP, CAUSAL, NAN_IF_HIDDEN, ATTENTION_PLACES };

class UsualAttention {
 public:
  AttentionCall call{};
  at::ScalarType type{};

  bool read(const c10::IValue* a) {
    const at::Tensor &q = a[Q].toTensor(), &k = a[KEYS].toTensor(), &v = a[VALUES].toTensor();
    type = q.scalar_type();
    if (!type_of(q, call.type) || !read_rows(q, call.q) || !read_rows(k, call.k) || !read_rows(v, call.v)) return false;
    call.batch = q.size(0), call.heads = q.size(1), call.queries = q.size(2), call.width = q.size(3);
    call.kv_heads = k.size(1), call.keys = k.size(2), call.v_width = v.size(3);
    call.scale = a[SCALE_OF_SCORES].toDouble(), call.softcap = a[SOFTCAP].toDouble();
    call.causal = a[CAUSAL].toBool(), call.nan_if_hidden = a[NAN_IF_HIDDEN].toBool();
    const bool same = k.size(0) == call.batch && k.size(3) == call.width &&
                      v.sizes().slice(0, 3) == k.sizes().slice(0, 3);
    return same && q.numel() && v.numel() && call.keys <= INT32_MAX &&
           call.heads % call.kv_heads == 0 && read_mask_and_sinks(a[MASK], a[SINKS]);
  }

 private:
  bool read_rows(const at::Tensor& t, Rows& to) const {
    if (!is_dense(t) || t.dim() != 4 || t.scalar_type() != type || t.stride(3) != 1) return false;
    const int64_t size = int64_t(t.element_size());
    to = {(const char*)t.const_data_ptr(), size * t.stride(0), size * t.stride(1), size * t.stride(2)};
    return true;
  }

  // A tensor that is broadcast to [batch, heads, queries, last], or none; `key`: the stride of what is last.
  bool read_broadcast(const c10::IValue& given, int64_t last, Rows& to, int64_t& type, int64_t& key) const {
    if (given.isNone()) return true;
    const at::Tensor& t = given.toTensor();
    DType numbers;
    if (t.scalar_type() == at::kBool) type = BOOL;
    else if (type_of(t, numbers)) type = numbers;
    else return false;
    if (!is_dense(t) || t.dim() > 4) return false;
    const int64_t full[] = {call.batch, call.heads, call.queries, last};
    int64_t strides[4] = {};  // 0 where it is broadcast
    for (int64_t i = 4 - t.dim(), d = 0; i < 4; i++, d++) {
      if (t.size(d) != 1 && t.size(d) != full[i]) return false;
      if (t.size(d) != 1) strides[i] = int64_t(t.element_size()) * t.stride(d);
    }
    to = {(const char*)t.const_data_ptr(), strides[0], strides[1], strides[2]};
    key = strides[3];
    return true;
  }

  bool read_mask_and_sinks(const c10::IValue& mask, const c10::IValue& sinks) {
    int64_t none;
    return read_broadcast(mask, call.keys, call.mask, call.mask_type, call.mask_key) &&
           read_broadcast(sinks, 1, call.sinks, call.sinks_type, none) && call.sinks_type != BOOL &&
           !(call.causal && call.mask.data);
  }
};

void attention(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  UsualAttention usual;
  if (!usual.read(stack->data() + stack->size() - ATTENTION_PLACES))
    return op.redispatchBoxed(keys.remove(c10::DispatchKey::BackendSelect), stack);
  AttentionCall& call = usual.call;
  const int64_t row = call.v_width, query = call.heads * row;
  at::Tensor out = at::detail::empty_strided_cpu({call.batch, call.heads, call.queries, row},
                                                 {call.queries * query, row, query, 1}, usual.type);
  call.out = out.mutable_data_ptr();
  call.one_thread = settings.forked;
  attend(call);
  torch::jit::drop(*stack, ATTENTION_PLACES);
  stack->emplace_back(std::move(out));
}

std::optional<torch::Library> serving;

}  // namespace

// From now on the dispatcher comes here first; with null, no longer.
extern "C" EXPORT void fqcompile_serve(const char* bytes) {
  serving.reset();
  if (!bytes) return;
  memcpy(&settings, bytes, sizeof(settings));
  static const int watched = pthread_atfork(nullptr, nullptr, [] { settings.forked = 1; });
  (void)watched;
  serving.emplace(torch::Library::IMPL, "fqcompile", c10::DispatchKey::BackendSelect, __FILE__, __LINE__);
  for (const char* name : {"matmul", "matmul.inference"})
    serving->impl(name, torch::CppFunction::makeFromBoxedFunction<&matmul>());
  serving->impl("attention", torch::CppFunction::makeFromBoxedFunction<&attention>());
}

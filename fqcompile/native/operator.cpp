// fqcompile::matmul, matmul.inference, dequantize, rows and attention, called by PyTorch's dispatcher with no
// Python between: 4 us a call, of which an operator that does nothing takes 3.5. By Python it takes 10,
// and more where weights have pushed Python out of the caches.
//
// This comes before the implementation for CPUs, which is Python's (kernels/op.py, cpu/attention.py). What
// is not usual is left to that one, unchanged: other kernels and layouts, and wrong arguments, of which it
// says what is wrong.
//
// Where the library is loaded and Python's fqcompile is not, as for exported programs in C++, it defines the
// operators too. What is not usual is then made so, by copies that are contiguous, or refused. So is every
// call on a processor without the kernels' instructions, of which this file has none: see library.py.
#include <ATen/EmptyTensor.h>
#include <pthread.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <span>
#include <sstream>
#include <vector>

#include "attention.h"
#include "call.h"

namespace {

// As `serve` of kernels/cpu/stream.py hands it over.
struct Settings {
  int64_t most_bf16_rows = INT64_MAX;  // of bf16 and one matrix; for more, Python's way is faster
  int64_t forked;  // whether this is a child of os.fork, where libgomp would wait for the parent's threads
} settings;

// Whether this processor has the instructions that the kernels are compiled for.
const bool is_here = (__builtin_cpu_init(), FQCOMPILE_ISA_IS_HERE);

// The values of the codes -8 to 7. This and the schemas come from native/interface.py.
constexpr float NORMAL[] = {FQCOMPILE_NORMAL_LEVELS};

// The schema's order.
enum Place {
  X, QWEIGHT, SCALE, BIAS, RESIDUAL, BITS, LEVELS, GROUP_SIZE, N, K, ACTIVATION, GATED, KERNEL, OFFSETS, IDS,
  ZERO_REST
};

constexpr const char* ACTIVATIONS[] = {"none", "relu", "gelu", "gelu_tanh", "silu", "swiglu_oai"};

bool type_of(at::ScalarType given, DType& type) {
  switch (given) {
    case at::kFloat: type = FP32; return true;
    case at::kBFloat16: type = BF16; return true;
    case at::kHalf: type = FP16; return true;
    default: return false;
  }
}

bool type_of(const at::Tensor& t, DType& type) { return type_of(t.scalar_type(), type); }

// What a call gives, if it is a usual one.
using Result = std::optional<at::Tensor>;

bool is_dense(const at::Tensor& t) { return t.key_set().has_all(c10::DispatchKeySet(c10::DispatchKey::CPU)); }

bool is(const at::Tensor& t, at::IntArrayRef sizes) {
  return is_dense(t) && t.sizes() == sizes && t.is_contiguous();
}

bool read_format(int64_t bits, const std::string& levels, int64_t group, int64_t rows, int64_t k, Weight& w) {
  if (rows <= 0 || k <= 0 || group <= 0 || (bits != 4 && bits != 8)) return false;
  if (levels != "uniform" && (levels != "normal" || bits != 4)) return false;
  w.values = levels == "normal" ? NORMAL : nullptr;
  w.bits = bits, w.group = std::min(group, k), w.rows = rows, w.k = k;
  return true;
}

// Of a stack of experts, or of one matrix, for which `stack` is empty.
bool read_weight(const at::Tensor& qweight, const at::Tensor& scale, const at::DimVector& stack, Weight& w) {
  at::DimVector words(stack), scales(stack);
  words.append({w.blocks(), w.padded_k() * w.bits / 32, OUTPUTS});
  scales.append({w.blocks(), w.groups(), OUTPUTS});
  if (qweight.scalar_type() != at::kInt || !is(qweight, words) || !is(scale, scales)) return false;
  w.words = (const uint32_t*)qweight.const_data_ptr();
  w.scales = scale.const_data_ptr();
  return type_of(scale, w.scale_type);
}

// A call that is read from the stack of arguments, if it is a usual one.
class Usual {
 public:
  Call call{};
  at::DimVector sizes;  // of y
  at::ScalarType type{};

  bool read(const c10::IValue* a) {
    return a[KERNEL].toStringRef() == "x86_stream" && read_form(a) && read_x(a[X].toTensor()) && read_routing(a) &&
           read_weight(a[QWEIGHT].toTensor(), a[SCALE].toTensor(), stack, call.weight) && read_bias(a[BIAS]) &&
           read_residual(a[RESIDUAL]);
  }

  // Rows of y past the last offset, which belong to no expert, are undefined until they are made zeros.
  void zero_rest() const {
    const int64_t e = call.experts - 1, row = call.n() * bytes_of(call.type);
    const int64_t used = call.routing_bytes == 8 ? ((int64_t*)call.routing)[e] : ((int32_t*)call.routing)[e];
    memset((char*)call.y + used * row, 0, size_t((call.m - used) * row));
  }

 private:
  at::DimVector stack;  // [experts] or []

  bool read_form(const c10::IValue* a) {
    const int64_t n = a[N].toInt();
    call.gated = a[GATED].toBool();
    const std::string& name = a[ACTIVATION].toStringRef();
    for (const char* known : ACTIVATIONS) {
      if (name == known)
        return read_format(a[BITS].toInt(), a[LEVELS].toStringRef(), a[GROUP_SIZE].toInt(), call.gated ? 2 * n : n,
                           a[K].toInt(), call.weight);
      call.activation = Activation(call.activation + 1);
    }
    return false;
  }

  bool read_x(const at::Tensor& x) {
    const int64_t k = call.weight.k;
    if (!is_dense(x) || !x.dim() || x.sizes().back() != k || !type_of(x, call.type)) return false;
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
    if (a[ZERO_REST].toBool() && a[OFFSETS].isNone()) return false;
    if (a[OFFSETS].isNone() && a[IDS].isNone()) return call.type != BF16 || call.m <= settings.most_bf16_rows;
    if (!a[OFFSETS].isNone() && !a[IDS].isNone()) return false;
    call.routing_is_ids = a[OFFSETS].isNone();
    const at::Tensor& told = a[call.routing_is_ids ? IDS : OFFSETS].toTensor();
    const at::Tensor& qweight = a[QWEIGHT].toTensor();
    if (qweight.dim() != 4 || sizes.size() != 2) return false;
    call.experts = qweight.size(0);
    stack.assign(1, call.experts);
    if (told.scalar_type() != at::kInt && told.scalar_type() != at::kLong) return false;
    if (!call.experts || !is(told, {call.routing_is_ids ? call.m : call.experts})) return false;
    call.routing = told.const_data_ptr();
    call.routing_bytes = int64_t(told.element_size());
    return true;
  }

  bool read_bias(const c10::IValue& given) {
    if (given.isNone()) return true;
    at::DimVector biases(stack);
    biases.push_back(call.weight.rows);
    const at::Tensor& bias = given.toTensor();
    if (bias.scalar_type() != type || !is(bias, biases)) return false;
    call.bias = bias.const_data_ptr();
    call.bias_type = call.type;
    return true;
  }

  bool read_residual(const c10::IValue& given) {
    if (given.isNone()) return true;
    const at::Tensor& residual = given.toTensor();
    if (!stack.empty() || residual.scalar_type() != type || !is(residual, sizes)) return false;
    call.residual = residual.const_data_ptr();
    call.residual_stride = call.n();
    return true;
  }
};

Result matmul(const c10::IValue* a) {
  Usual usual;
  if (!usual.read(a)) return {};
  at::Tensor y = at::detail::empty_cpu(usual.sizes, usual.type);
  usual.call.y = y.mutable_data_ptr();
  usual.call.one_thread = settings.forked;
  if (usual.call.m && !multiply(usual.call)) return {};
  if (usual.call.m && a[ZERO_REST].toBool()) usual.zero_rest();
  return y;
}

// ŵ [rows, K], for fqcompile::dequantize.
Result dequantize(const c10::IValue* a) {
  enum { QWEIGHT, SCALE, BITS, LEVELS, GROUP_SIZE, ROWS, K, DTYPE, KERNEL };
  Panel panel{};
  Weight& w = panel.weight;
  const at::ScalarType type = a[DTYPE].toScalarType();
  if (a[KERNEL].toStringRef() != "x86_stream" || !type_of(type, panel.type) ||
      !read_format(a[BITS].toInt(), a[LEVELS].toStringRef(), a[GROUP_SIZE].toInt(), a[ROWS].toInt(), a[K].toInt(), w) ||
      !read_weight(a[QWEIGHT].toTensor(), a[SCALE].toTensor(), {}, w))
    return {};
  const at::Tensor turned = at::detail::empty_cpu({w.k, w.rows}, type);
  panel.count = w.blocks();
  panel.to = turned.mutable_data_ptr();
  panel.stride = w.rows;
  panel.one_thread = settings.forked;
  ::dequantize(panel);
  return turned.t().contiguous();
}

// ŵ[ids], for fqcompile::rows.
Result rows(const c10::IValue* a) {
  enum { QWEIGHT, SCALE, IDS, BITS, LEVELS, GROUP_SIZE, ROWS, K, DTYPE, KERNEL };
  Picked picked{};
  Weight& w = picked.weight;
  const at::ScalarType type = a[DTYPE].toScalarType();
  const at::Tensor& asked = a[IDS].toTensor();
  if (a[KERNEL].toStringRef() != "x86_stream" || !type_of(type, picked.type) || !is_dense(asked) ||
      (asked.scalar_type() != at::kInt && asked.scalar_type() != at::kLong) ||
      !read_format(a[BITS].toInt(), a[LEVELS].toStringRef(), a[GROUP_SIZE].toInt(), a[ROWS].toInt(), a[K].toInt(), w) ||
      !read_weight(a[QWEIGHT].toTensor(), a[SCALE].toTensor(), {}, w))
    return {};
  const at::Tensor flat = asked.to(at::kLong).contiguous();
  std::vector<int64_t> ids(flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel());
  for (const int64_t id : ids)
    TORCH_CHECK_INDEX(0 <= id && id < w.rows, "row ", id, " is out of range: the weight has ", w.rows, " rows");
  at::DimVector sizes(asked.sizes());
  sizes.push_back(w.k);
  at::Tensor y = at::detail::empty_cpu(sizes, type);
  picked.ids = ids.data(), picked.count = int64_t(ids.size());
  picked.to = y.mutable_data_ptr();
  picked.one_thread = settings.forked;
  ::dequantize(picked);
  return y;
}

// fqcompile::attention, likewise.
enum AttentionPlace { Q, KEYS, VALUES, MASK, SINKS, SCALE_OF_SCORES, SOFTCAP, CAUSAL, NAN_IF_HIDDEN };

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

Result attention(const c10::IValue* a) {
  UsualAttention usual;
  if (!usual.read(a)) return {};
  AttentionCall& call = usual.call;
  const int64_t row = call.v_width, query = call.heads * row;
  at::Tensor out = at::detail::empty_strided_cpu({call.batch, call.heads, call.queries, row},
                                                 {call.queries * query, row, query, 1}, usual.type);
  call.out = out.mutable_data_ptr();
  call.one_thread = settings.forked;
  attend(call);
  return out;
}

// What only Python could run, where there is none.
[[noreturn]] void refuse(const c10::OperatorHandle& op, std::span<const c10::IValue> arguments) {
  TORCH_CHECK(is_here, op.operator_name().name, ": this file of fqcompile's library was built for " FQCOMPILE_ISA
              " instructions, and this processor lacks some. One for all x86 processors since 2015 is at the path ",
              "that `FQCOMPILE_CPU_ISA=avx2 python -c 'import fqcompile; print(fqcompile.library_path())'` prints.");
  std::ostringstream call;
  for (size_t i = 0; i < arguments.size(); i++) {
    call << (i ? ", " : "") << op.schema().arguments()[i].name() << "=";
    if (!arguments[i].isTensor()) call << arguments[i];
    else if (const at::Tensor& t = arguments[i].toTensor(); t.defined())
      call << t.toString() << t.sizes() << " on " << t.device();
  }
  TORCH_CHECK(false, op.operator_name().name, ": fqcompile's library for x86 was loaded without Python's fqcompile. ",
              "It runs the kernel x86_stream alone, on CPU tensors that fit together. `import fqcompile` in this ",
              "process, which has the other kernels and says what does not fit. The call: ", call.str());
}

template <Result (*run)(const c10::IValue*)>
void serve(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const size_t places = op.schema().arguments().size();
  const std::span<c10::IValue> arguments(stack->data() + stack->size() - places, places);
  Result y = is_here ? run(arguments.data()) : Result{};
  if (!y && op.hasKernelForDispatchKey(c10::DispatchKey::CPU))
    return op.redispatchBoxed(keys.remove(c10::DispatchKey::BackendSelect), stack);
  if (!y) {
    for (c10::IValue& a : arguments)
      if (a.isTensor() && is_dense(a.toTensor())) a = a.toTensor().contiguous();
    if (is_here) y = run(arguments.data());
    if (!y) refuse(op, arguments);
  }
  torch::jit::drop(*stack, places);
  stack->emplace_back(std::move(*y));
}

std::optional<torch::Library> serving, defined;

c10::Dispatcher& dispatcher() { return c10::Dispatcher::singleton(); }

// From now on the dispatcher comes here first, unless it comes to another copy of this library already.
void begin_to_serve() {
  static const int watched = pthread_atfork(nullptr, nullptr, [] { settings.forked = 1; });
  (void)watched;
  if (dispatcher().findSchemaOrThrow("fqcompile::matmul", "").hasKernelForDispatchKey(c10::DispatchKey::BackendSelect))
    return;
  serving.emplace(torch::Library::IMPL, "fqcompile", c10::DispatchKey::BackendSelect, __FILE__, __LINE__);
  for (const char* name : {"matmul", "matmul.inference"})
    serving->impl(name, torch::CppFunction::makeFromBoxedFunction<&serve<matmul>>());
  serving->impl("dequantize", torch::CppFunction::makeFromBoxedFunction<&serve<dequantize>>());
  serving->impl("rows", torch::CppFunction::makeFromBoxedFunction<&serve<rows>>());
  serving->impl("attention", torch::CppFunction::makeFromBoxedFunction<&serve<attention>>());
}

// As the library is loaded: Python defines the operators before it loads it.
[[maybe_unused]] const bool alone = [] {
  if (dispatcher().findSchema({"fqcompile::matmul", ""})) return false;
  defined.emplace(torch::Library::FRAGMENT, "fqcompile", std::nullopt, __FILE__, __LINE__);
  for (const char* schema : {FQCOMPILE_SCHEMAS}) defined->def(schema, {at::Tag::pt2_compliant_tag});
  begin_to_serve();
  return true;
}();

}  // namespace

// With null, the dispatcher comes here no longer.
extern "C" EXPORT void fqcompile_serve(const char* bytes) {
  serving.reset();
  if (!bytes) return;
  memcpy(&settings, bytes, sizeof(settings));
  begin_to_serve();
}

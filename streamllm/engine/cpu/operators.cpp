// The kernels as torch's operators; what is known of their arguments is written down in `cpu_kernels.py`.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "attention.h"
#include "matrix_vector.h"

namespace {

using at::Tensor;
using namespace streamllm;

// Calls f(i) for i < count, in the threads that torch has.
const auto in_parallel = [](int64_t count, const auto& f) {
  const int64_t threads = at::get_num_threads();
  at::parallel_for(0, count, (count + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i);
  });
};

// Calls f with the kind of number that a tensor has, known to the compiler; `eight`: that of eight bits, if it has some.
template <at::ScalarType eight_bits, Kept eight, typename F>
void with_kept(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return f(std::integral_constant<Kept, FLOAT32>());
    case at::kHalf: return f(std::integral_constant<Kept, FLOAT16>());
    case at::kBFloat16: return f(std::integral_constant<Kept, BFLOAT16>());
    case eight_bits: return f(std::integral_constant<Kept, eight>());
    default: TORCH_CHECK(false, "our kernel for CPUs reads no ", tensor.scalar_type());
  }
}

const char* bytes(const Tensor& tensor) { return static_cast<const char*>(tensor.const_data_ptr()); }

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

void check_contiguous(const Tensor& tensor) { TORCH_CHECK(tensor.is_contiguous(), "a tensor that is not contiguous"); }

Tensor decode_attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                        const std::optional<Tensor>& sinks, double scaling, double cap) {
  for (const Tensor& tensor : {query, key, value}) check_contiguous(tensor);
  const int64_t batch = key.size(0), kv_heads = key.size(1);
  const Shape shape{batch * kv_heads, kv_heads, query.size(1) / kv_heads, key.size(2), key.size(3), value.size(3)};
  Tensor output = at::empty({batch, query.size(1), 1, shape.value_size}, query.options());
  with_kept<at::kFloat8_e4m3fn, FLOAT8_E4M3>(key, [&](auto kept) {
    attention<kept>(shape, query.const_data_ptr<float>(), bytes(key), bytes(value), data_or_null<bool>(mask),
                    data_or_null<float>(sinks), output.mutable_data_ptr<float>(), static_cast<float>(scaling),
                    static_cast<float>(cap), at::get_num_threads(), in_parallel);
  });
  return output;
}

Tensor matrix_vector(const Tensor& weight, const Tensor& vector) {
  for (const Tensor& tensor : {weight, vector}) check_contiguous(tensor);
  Tensor output = at::empty({weight.size(0)}, vector.options());
  with_kept<at::kChar, INT8>(weight, [&](auto kept) {
    multiply<kept>(bytes(weight), vector.const_data_ptr<float>(), output.mutable_data_ptr<float>(), weight.size(0),
                   weight.size(1), in_parallel);
  });
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(streamllm, CPU, library) {
  library.impl("decode_attention", &decode_attention);
  library.impl("matrix_vector", &matrix_vector);
}

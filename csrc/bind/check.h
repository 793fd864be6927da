// Argument checks shared by all ops. Each failure throws std::runtime_error, in Python a RuntimeError, that reads
// "foldkv: <what>: expected E, got G; fix". Texts are built only when a check fails.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace foldkv::bind {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// In a shape: this dimension may have any size.
constexpr int64_t kAny = -1;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "foldkv: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// The parts are evaluated even when `ok`: pass plain values, and build longer texts behind an `if` with fail().
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) fail(parts...);
}

// "torch.uint8" and so on, as Python prints it.
inline std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Bool: return "torch.bool";
    default: return std::string("torch.") + torch::headeronly::toString(dtype);
  }
}

// "[2, 8, 64]"; kAny is written "*".
template <class Sizes>
std::string sizes_text(const Sizes& sizes) {
  std::string text = "[";
  for (int64_t size : sizes) {
    if (text.size() > 1) text += ", ";
    text += size == kAny ? "*" : std::to_string(size);
  }
  return text + "]";
}

inline std::string shape_text(const Tensor& tensor) { return sizes_text(tensor.sizes()); }

// "cpu", "cuda:0".
inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device:") + std::to_string(tensor.get_device_index());
}

inline void check_dtype(const Tensor& tensor, const char* name, std::initializer_list<ScalarType> allowed) {
  const ScalarType dtype = tensor.scalar_type();
  std::string expected;
  for (ScalarType one : allowed) {
    if (one == dtype) return;
    expected += (expected.empty() ? "" : " or ") + dtype_text(one);
  }
  fail(name, ": expected ", expected, ", got ", dtype_text(dtype), "; convert it with .to()");
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype) {
  if (tensor.scalar_type() != dtype) check_dtype(tensor, name, {dtype});
}

// `sizes` may hold kAny; `meaning` explains the dimensions, e.g. "num_pages, h_kv, page_bytes".
inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes,
                        const char* meaning = nullptr) {
  bool ok = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t dim = 0;
  for (int64_t size : sizes) {
    if (ok && size != kAny) ok = tensor.size(dim) == size;
    ++dim;
  }
  if (ok) return;
  const std::string note = meaning == nullptr ? "" : std::string(" (") + meaning + ")";
  fail(name, ": expected shape ", sizes_text(sizes), note, ", got ", shape_text(tensor));
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  if (tensor.is_contiguous()) return;
  fail(name, ": expected a contiguous tensor, got shape ", shape_text(tensor), " with strides ",
       sizes_text(tensor.strides()), "; call .contiguous() and keep the result");
}

// The last dimension lies without gaps; the others may be strided. An empty tensor has nothing to lie anywhere.
inline void check_rows(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  if (last < 0 || tensor.numel() == 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1) return;
  fail(name, ": expected a contiguous last dimension, got shape ", shape_text(tensor), " with strides ",
       sizes_text(tensor.strides()), "; call .contiguous()");
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() ? b.is_cpu() : a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline void check_same_device(const Tensor& tensor, const char* name, const Tensor& like, const char* like_name) {
  if (same_device(tensor, like)) return;
  fail(name, ": expected ", device_text(like), " as ", like_name, ", got ", device_text(tensor),
       "; move one with .to()");
}

// What 16-byte loads and stores on a GPU need.
inline void check_aligned(const Tensor& tensor, const char* name) {
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0) return;
  fail(name, ": expected 16-byte aligned data, got a view that starts between; allocate it on its own");
}

// dtype, shape and contiguity in one line.
inline void check_tensor(const Tensor& tensor, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes,
                         const char* meaning = nullptr) {
  check_dtype(tensor, name, dtype);
  check_shape(tensor, name, sizes, meaning);
  check_contiguous(tensor, name);
}

}  // namespace foldkv::bind

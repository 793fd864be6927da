// The arguments that describe a layer's cache, checked once for all ops and devices.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "bind/check.h"
#include "core/dynamic.h"
#include "core/params.h"

namespace foldkv::bind {

using OptionalTensor = std::optional<Tensor>;

// int32 sizes inside the kernels.
inline int to_int(const char* name, int64_t value) {
  check(value >= 0 && value <= INT32_MAX, name, ": expected 0 .. 2^31 - 1, got ", value);
  return static_cast<int>(value);
}

inline DType row_dtype(const Tensor& rows, const char* name) {
  check_dtype(rows, name, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
  if (rows.scalar_type() == ScalarType::Float) return DType::Float32;
  return rows.scalar_type() == ScalarType::Half ? DType::Float16 : DType::BFloat16;
}

// [tokens, heads, d] rows, any strides but the last.
inline Rows as_rows(const Tensor& rows, const char* name) {
  check_rows(rows, name);
  return {rows.const_data_ptr(), row_dtype(rows, name), rows.stride(0), rows.stride(1)};
}

inline Format as_format(const char* name, int64_t code) {
  const Format format = Format::decode(code);
  bool known = false;
  for (const Codec& codec : kCodecs) known = known || codec.id == format.codec;
  if (!known || code < 0 || code >> 11 != 0) fail(name, ": expected a code of quant.spec.Format.code, got ", code);
  const bool integer = kCodecs[format.codec].kind == Kind::Integer;
  if (!integer && code >> 8 != 0) fail(name, ": expected a float codec without scales, got code ", code);
  if (!format.dynamic && (format.stored_zero || format.rotate)) {
    fail(name, ": expected stored zeros and rotation only with dynamic scales, got code ", code);
  }
  return format;
}

constexpr int kMaxShapedDim = 256;  // as quant/spec.py has it

struct CacheShape {
  int64_t num_pages;
  int h_kv, d, page_size;
};

inline CacheShape cache_shape(const Tensor& k_cache, const Tensor& k_params, int64_t page_size) {
  check_shape(k_params, "k_params", {kNumParamRows, kAny, kAny}, "scale/zero/mean/balance/query, h_kv, d");
  const int64_t h_kv = k_params.size(1), d = k_params.size(2);
  check(d % 16 == 0 && d >= 16 && d <= kMaxHeadDim, "head_dim: expected a multiple of 16 up to ", kMaxHeadDim, ", got ",
        d);
  check(page_size == 16 || page_size == 32 || page_size == 64 || page_size == 128,
        "page_size: expected 16, 32, 64 or 128, got ", page_size);
  check_shape(k_cache, "k_cache", {kAny, h_kv, kAny}, "num_pages, h_kv, page_bytes");
  return {k_cache.size(0), to_int("h_kv", h_kv), static_cast<int>(d), static_cast<int>(page_size)};
}

inline Cache as_cache(const Tensor& codes, const Tensor& meta, const Tensor& params, int64_t format_code,
                      const CacheShape& shape, bool is_k) {
  const Format format = as_format(is_k ? "k_format" : "v_format", format_code);
  const int64_t page_bytes = int64_t{shape.page_size} * row_bytes(kCodecs[format.codec].bits, shape.d);
  check_tensor(codes, is_k ? "k_cache" : "v_cache", ScalarType::Byte, {shape.num_pages, shape.h_kv, page_bytes},
               "num_pages, h_kv, page_size * row_bytes");
  check_tensor(meta, is_k ? "k_meta" : "v_meta", ScalarType::Byte,
               {shape.num_pages, shape.h_kv, int64_t{shape.page_size} * format.meta_bytes()},
               "num_pages, h_kv, page_size * meta_bytes");
  check_tensor(params, is_k ? "k_params" : "v_params", ScalarType::Float, {kNumParamRows, shape.h_kv, shape.d},
               "scale/zero/mean/balance/query, h_kv, d");
  return {static_cast<uint8_t*>(codes.mutable_data_ptr()), static_cast<uint8_t*>(meta.mutable_data_ptr()),
          static_cast<const float*>(params.const_data_ptr()), nullptr, format};
}

// What rows are shaped by, or null; only formats that Format.shapes_rounding of quant/spec.py names take one.
inline const int8_t* as_shaping(const OptionalTensor& shaping, const char* name, const Format& format,
                                const CacheShape& shape) {
  if (!shaping.has_value()) return nullptr;
  const int bits = kCodecs[format.codec].bits;
  if (!format.dynamic || !(bits == 8 || (bits == kSearchBits && format.stored_zero))) {
    fail(name, ": expected none for a format whose codes are rounded alone, got shape ", shape_text(*shaping));
  }
  if (shape.d > kMaxShapedDim) {
    fail(name, ": expected none for a head_dim above ", kMaxShapedDim, ", got head_dim ", shape.d);
  }
  check_tensor(*shaping, name, ScalarType::Char, {shape.h_kv, shape.d, shape.d}, "h_kv, d, d");
  return static_cast<const int8_t*>(shaping->const_data_ptr());
}

template <class T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace foldkv::bind

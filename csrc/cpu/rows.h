// Rows of d channels: reading and writing them in a tensor's dtype, rotating them.
#pragma once

#include "core/float16.h"
#include "core/params.h"
#include "cpu/simd.h"

namespace foldkv::FOLDKV_ISA {

inline void read_row(const Rows& rows, int64_t token, int head, int d, float* out) {
  const int64_t at = token * rows.token_stride + head * rows.head_stride;
  for (int c = 0; c < d; c += 16) {
    switch (rows.dtype) {
      case DType::Float32: store(out + c, load(static_cast<const float*>(rows.data) + at + c)); break;
      case DType::Float16: store(out + c, load_f16(static_cast<const uint16_t*>(rows.data) + at + c)); break;
      case DType::BFloat16: store(out + c, load_bf16(static_cast<const uint16_t*>(rows.data) + at + c)); break;
    }
  }
}

// Rounds half to even; NaN stays NaN.
inline void write_row(void* data, DType dtype, int64_t at, const float* values, int d) {
  if (dtype == DType::Float32) {
    std::memcpy(static_cast<float*>(data) + at, values, d * sizeof(float));
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(data) + at;
  const bool half = dtype == DType::Float16;
  for (int c = 0; c < d; ++c) {
    if (values[c] != values[c]) {
      out[c] = half ? 0x7e00 : 0x7fc0;
    } else {
      out[c] = half ? float_to_half(values[c]) : float_to_bf16(values[c]);
    }
  }
}

inline bool is_finite(float x) { return (float_to_bits(x) & 0x7f800000) != 0x7f800000; }

inline int count_nonfinite(const float* x, int d) {
  int count = 0;
  for (int c = 0; c < d; ++c) count += is_finite(x[c]) ? 0 : 1;
  return count;
}

// Orthonormal block-diagonal Hadamard transform in place, its own inverse: butterflies of distance 1, 2, 4, ..., then
// one multiplication. Every step rounds once, so that all devices give the same bits.
inline void hadamard(float* x, int d) {
  const int block = hadamard_block(d);
  for (int step = 1; step < block; step *= 2) {
    for (int base = 0; base < d; base += 2 * step) {
      for (int i = base; i < base + step; ++i) {
        const float a = x[i], b = x[i + step];
        x[i] = a + b;
        x[i + step] = a - b;
      }
    }
  }
  const F norm = splat(static_cast<float>(1.0 / std::sqrt(static_cast<double>(block))));
  for (int c = 0; c < d; c += 16) store(x + c, load(x + c) * norm);
}

}  // namespace foldkv::FOLDKV_ISA

// Rows of d channels held by a warp: lane l has the channels l, l + 32, l + 64, ... Reading, rotating, summing, writing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/params.h"

namespace foldkv::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float load_element(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::Float32: return static_cast<const float*>(data)[at];
    case DType::Float16: return __half2float(static_cast<const __half*>(data)[at]);
    default: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
  }
}

// Rounds half to even; NaN stays NaN.
__device__ __forceinline__ void store_element(void* data, DType dtype, int64_t at, float x) {
  switch (dtype) {
    case DType::Float32: static_cast<float*>(data)[at] = x; break;
    case DType::Float16: static_cast<__half*>(data)[at] = __float2half_rn(x); break;
    default: static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(x); break;
  }
}

// A lane's channels at, at + 32, ...: one branch for all, as code is scarce.
template <int N>
__device__ __forceinline__ void load_lane(float (&x)[N], const void* data, DType dtype, int64_t at) {
  if (dtype == DType::Float32) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = static_cast<const float*>(data)[at + 32 * i];
    return;
  }
  const bool half = dtype == DType::Float16;
  const auto* from = static_cast<const uint16_t*>(data) + at;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const uint16_t raw = from[32 * i];
    x[i] = half ? __half2float(__ushort_as_half(raw)) : __uint_as_float(static_cast<uint32_t>(raw) << 16);
  }
}

template <int N>
__device__ __forceinline__ void store_lane(const float (&x)[N], void* data, DType dtype, int64_t at) {
  if (dtype == DType::Float32) {
#pragma unroll
    for (int i = 0; i < N; ++i) static_cast<float*>(data)[at + 32 * i] = x[i];
    return;
  }
  const bool half = dtype == DType::Float16;
  auto* to = static_cast<uint16_t*>(data) + at;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[32 * i] = half ? __half_as_ushort(__float2half_rn(x[i])) : __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}

// Orthonormal block-diagonal Hadamard transform of a row of D channels (D a multiple of 32): butterflies of distance
// 1, 2, 4, ..., then one multiplication; every step rounds once, as on the CPU, so the bits agree.
template <int D>
__device__ __forceinline__ void hadamard_row(float (&x)[D / 32], int lane) {
  constexpr int kBlock = hadamard_block(D);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float sign = (lane & step) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      const float other = __shfl_xor_sync(kFullWarp, x[i], step);
      x[i] = __fmaf_rn(x[i], sign, other);  // a sum or a difference, rounded once
    }
  }
#pragma unroll
  for (int step = 1; step < kBlock / 32; step *= 2) {
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      if ((i & step) == 0) {
        const float a = x[i], b = x[i + step];
        x[i] = __fadd_rn(a, b);
        x[i + step] = __fsub_rn(a, b);
      }
    }
  }
  constexpr double kNorm[] = {1.0,    0.70710678118654752440, 0.5,   0.35355339059327376220,
                              0.25,   0.17677669529663688110, 0.125, 0.08838834764831844055,
                              0.0625, 0.04419417382415922028};
  constexpr int kLog = kBlock == 32 ? 5 : kBlock == 64 ? 6 : kBlock == 128 ? 7 : kBlock == 256 ? 8 : 9;
  const float norm = static_cast<float>(kNorm[kLog]);
#pragma unroll
  for (int i = 0; i < D / 32; ++i) x[i] = __fmul_rn(x[i], norm);
}

// The greater; NaN if either is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}

// V elements of any dtype as they lie in memory: V words of fp32, or V / 2 of the others. `vectors`: data at `at` is
// 16-byte aligned. V is a multiple of 8.
template <int V>
__device__ __forceinline__ void fetch_elements(const void* data, DType dtype, int64_t at, bool vectors,
                                               uint32_t (&raw)[V]) {
  const bool wide = dtype == DType::Float32;
  if (vectors) {
    const auto* from =
        reinterpret_cast<const uint4*>(static_cast<const char*>(data) + at * (wide ? sizeof(float) : sizeof(__half)));
#pragma unroll
    for (int i = 0; i < V / 4; ++i) {
      if (i >= V / 8 && !wide) break;
      const uint4 held = __ldg(from + i);
      raw[4 * i] = held.x, raw[4 * i + 1] = held.y, raw[4 * i + 2] = held.z, raw[4 * i + 3] = held.w;
    }
  } else if (wide) {
#pragma unroll
    for (int i = 0; i < V; ++i) raw[i] = static_cast<const uint32_t*>(data)[at + i];
  } else {
    const auto* from = static_cast<const uint16_t*>(data) + at;
#pragma unroll
    for (int i = 0; i < V / 2; ++i) raw[i] = from[2 * i] | static_cast<uint32_t>(from[2 * i + 1]) << 16;
  }
}

template <int V>
__device__ __forceinline__ void widen_elements(const uint32_t (&raw)[V], DType dtype, float (&x)[V]) {
  if (dtype == DType::Float32) {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = __uint_as_float(raw[i]);
  } else if (dtype == DType::BFloat16) {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      x[2 * i] = __uint_as_float(raw[i] << 16);
      x[2 * i + 1] = __uint_as_float(raw[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      x[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(raw[i])));
      x[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(raw[i] >> 16)));
    }
  }
}

// Bytes of a lane, written with as few stores as alignment to `Bytes` (at most 16) allows.
template <int Bytes>
__device__ __forceinline__ void store_words(uint8_t* to, const uint32_t* words) {
  if constexpr (Bytes == 2) {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(words[0]);
  } else if constexpr (Bytes == 4) {
    *reinterpret_cast<uint32_t*>(to) = words[0];
  } else if constexpr (Bytes == 8) {
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  } else {
    static_assert(Bytes % 16 == 0, "a lane's bytes");
#pragma unroll
    for (int i = 0; i < Bytes / 16; ++i) {
      reinterpret_cast<uint4*>(to)[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    }
  }
}

}  // namespace foldkv::cuda

// C16 on the GPU: fp16 or bf16 elements, as they are.
#pragma once

#include "cuda/ptx.cuh"

namespace foldkv::cuda {

template <int Id, class MathT>
struct Float16Codec {
  static constexpr int kId = Id, kBits = 16;
  static constexpr bool kInteger = false;
  static constexpr float kMid = 0.0f;
  static constexpr float kUnit = 1.0f;
  using Math = MathT;

  // K: see int4/codec.cuh; 4 words a row, of 4 units of 8 channels: two units a k-step.
  __device__ static __forceinline__ void k_fragments(const uint32_t (&word)[4][2], uint32_t (&a)[2][4]) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int part = 0; part < 4; ++part) a[step][part] = word[2 * step + part / 2][part % 2];
    }
  }
  __host__ __device__ static constexpr int k_channel(int t, int i) { return 8 * (i / 2) + 2 * t + i % 2; }
  __host__ __device__ static constexpr float k_factor(int) { return 1.0f; }

  // V: two units of 8 channels make a tile.
  __device__ static __forceinline__ void v_fragments(const uint32_t (&word)[4][2], uint32_t (&a)[2][4]) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int part = 0; part < 4; ++part) a[tile][part] = word[2 * tile + part % 2][part / 2];
    }
  }
  __host__ __device__ static constexpr int v_channel(int tile, int high, int g) { return 16 * tile + 8 * high + g; }
  __host__ __device__ static constexpr float v_factor(int) { return 1.0f; }
};

using Fp16 = Float16Codec<1, HalfMath>;
using Bf16 = Float16Codec<2, Bfloat16Math>;

}  // namespace foldkv::cuda

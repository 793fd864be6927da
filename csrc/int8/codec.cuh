// C8 on the GPU: one unsigned code a byte.
#pragma once

#include "cuda/ptx.cuh"

namespace foldkv::cuda {

// A byte in the low end of a 16-bit word is an fp16 subnormal worth code * 2^-24, which tensor cores take exactly.
struct Int8 {
  static constexpr int kId = 3, kBits = 8;
  static constexpr bool kInteger = true;
  static constexpr float kMid = 128.0f;
  static constexpr float kUnit = 0x1p24f;
  using Math = HalfMath;

  // K: see int4/codec.cuh; 2 words a row, one k-step each: bytes 0, 1 and bytes 2, 3.
  __device__ static __forceinline__ void k_fragments(const uint32_t (&word)[2][2], uint32_t (&a)[2][4]) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        a[step][row] = __byte_perm(word[step][row], 0, 0x4140);
        a[step][row + 2] = __byte_perm(word[step][row], 0, 0x4342);
      }
    }
  }
  __host__ __device__ static constexpr int k_channel(int t, int i) { return 16 * (i / 4) + 4 * t + i % 4; }
  __host__ __device__ static constexpr float k_factor(int) { return 1.0f; }

  // V: a unit of 16 bytes is a tile of 16 channels; a word holds two channels of two tokens.
  __device__ static __forceinline__ void v_fragments(const uint32_t (&word)[2][2], uint32_t (&a)[2][4]) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[tile][2 * half] = __byte_perm(word[tile][half], 0, 0x4240);
        a[tile][2 * half + 1] = __byte_perm(word[tile][half], 0, 0x4341);
      }
    }
  }
  __host__ __device__ static constexpr int v_channel(int tile, int high, int g) { return 16 * tile + 2 * g + high; }
  __host__ __device__ static constexpr float v_factor(int) { return kUnit; }
};

}  // namespace foldkv::cuda

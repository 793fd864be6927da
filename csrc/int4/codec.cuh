// C4 on the GPU: two unsigned codes a byte, the even channel in the low nibble; a 32-bit word holds 8 codes.
#pragma once

#include "cuda/ptx.cuh"

namespace foldkv::cuda {

// A masked nibble is already a number: as an fp16 subnormal, bits 0..3 are worth code * 2^-24 and bits 4..7 code * 2^-20.
// Tensor cores take subnormals exactly, so a code costs half an instruction and no magic constant has to be subtracted.
struct Int4 {
  static constexpr int kId = 4, kBits = 4;
  static constexpr bool kInteger = true;
  static constexpr float kMid = 8.0f;
  static constexpr float kUnit = 0x1p24f;  // 1 / what a code of 1 is worth in a fragment
  using Math = HalfMath;

  static constexpr uint32_t kEven = 0x000f000f, kOdd = 0x00f000f0;  // nibbles 0 and 4; 1 and 5, worth 16 times more

  // K, 32 channels of two rows (token g and g + 8): word [row], of 1 word a row. Fragments of two k-steps.
  __device__ static __forceinline__ void k_fragments(const uint32_t (&word)[1][2], uint32_t (&a)[2][4]) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const uint32_t w = word[0][row] >> (8 * step);
        a[step][row] = w & kEven;
        a[step][row + 2] = w & kOdd;
      }
    }
  }
  // Which channel of the 32 the query value i of thread t belongs to, values in the order that the fragments want them:
  // k-step i / 4; and what the query is multiplied by, to make up for the odd nibbles' weight.
  __host__ __device__ static constexpr int k_channel(int t, int i) {
    return 8 * t + 2 * (i / 4) + (i % 4 / 2) + 4 * (i % 2);
  }
  __host__ __device__ static constexpr float k_factor(int i) { return i % 4 / 2 == 0 ? 1.0f : 1.0f / 16; }

  // V, 32 channels of 16 tokens: word [unit of 16 bytes][tokens 0..7, 8..15], each 4 channels of two tokens.
  // Fragments of two tiles of 16 channels.
  __device__ static __forceinline__ void v_fragments(const uint32_t (&word)[1][2], uint32_t (&a)[2][4]) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t w = word[0][half] >> (8 * tile);
        a[tile][2 * half] = w & kEven;
        a[tile][2 * half + 1] = w & kOdd;
      }
    }
  }
  // Which of the 32 channels row g + 8 * high of a tile is, and what its sums are multiplied by.
  __host__ __device__ static constexpr int v_channel(int tile, int high, int g) { return 4 * g + 2 * tile + high; }
  __host__ __device__ static constexpr float v_factor(int high) { return high == 0 ? kUnit : kUnit / 16; }
};

}  // namespace foldkv::cuda

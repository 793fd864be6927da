// Codes, and the scales that come with tokens, from a queue's slot to registers.
#pragma once

#include "cuda/finish.cuh"

namespace foldkv::cuda {

struct Scale {
  float scale, zero;
};

// Bf16 scale and fp16 zero, or the middle code, of one token.
template <class C>
__device__ __forceinline__ Scale unpack_scale(uint32_t raw, bool stored_zero) {
  const float zero = stored_zero ? __half2float(__ushort_as_half(static_cast<uint16_t>(raw >> 16))) : C::kMid;
  return {__uint_as_float(raw << 16), zero};
}

// The same as it lies in shared memory: of one token, and of two tokens from an even row on.
__device__ __forceinline__ uint32_t load_scale(const Format& format, uint32_t meta, int row) {
  uint32_t raw;
  if (format.stored_zero) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(raw) : "r"(meta + 4 * row) : "memory");
  } else {
    uint16_t half;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(half) : "r"(meta + 2 * row) : "memory");
    raw = half;
  }
  return raw;
}
__device__ __forceinline__ uint2 load_scales(const Format& format, uint32_t meta, int row) {
  uint2 raw;
  if (format.stored_zero) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(raw.x), "=r"(raw.y) : "r"(meta + 4 * row) : "memory");
  } else {
    uint32_t both;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(both) : "r"(meta + 2 * row) : "memory");
    raw = make_uint2(both & 0xffff, both >> 16);
  }
  return raw;
}

// Words of kSpan slices of 32 channels, kKeySpan at the best, from `slice` on, of 16 tokens: [slice][unit][tokens 0..7, 8..15]. `row`: address
// of the row that this lane names; `high`: which of two units; `first`: where unit `high` lies in the row: KeyLane. Tensor cores
// want the registers of a fragment in a row, and 16-bit elements are fragments as they come: kByTokens puts a token's two units
// side by side, as a B fragment has them; otherwise the two halves of the tokens are, as in an A fragment.
template <class K>
constexpr int kKeySpan = K::kBits == 4 ? 2 : 1;
template <bool kByTokens>
struct KeyLane {
  __device__ static __forceinline__ unsigned row(unsigned lane) {
    return kByTokens ? lane % 8 + lane / 16 * 8 : lane % 16;
  }
  __device__ static __forceinline__ unsigned high(unsigned lane) { return kByTokens ? lane / 8 % 2 : lane / 16; }
};
template <class S, class K, bool kByTokens, int kSpan>
__device__ __forceinline__ void load_keys(uint32_t (&word)[kSpan][K::kBits / 4][2], int slice, uint32_t row,
                                          uint32_t first, unsigned high) {
  using Layout = typename S::KSwizzle;
  constexpr int kUnits = S::kKRow / 16, kWords = K::kBits / 4;
  if constexpr (kSpan * kWords == 1) {
    static_assert(!kByTokens, "one unit has no neighbour");
    load_tiles(word[0][0], row + (first ^ (slice << 4)));
  } else {
#pragma unroll
    for (int i = 0; i < kSpan * kWords; i += 2) {
      const int unit = slice * kWords + i;
      const bool both = unit + 1 < kUnits;  // the last one may be single
      uint32_t r[4];
      load_tiles(r, row + unit / Layout::kPartUnits * S::kStageTokens * Layout::kPitch +
                        ((both ? first : first ^ (high << 4)) ^ (unit % Layout::kPartUnits << 4)));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (j == 1 && !both) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          word[(i + j) / kWords][(i + j) % kWords][half] = r[kByTokens ? j + 2 * half : 2 * j + half];
        }
      }
    }
  }
}

// Words of a slice of 32 channels of a k-step of 16 tokens, or of two k-steps at once: [k-step][unit][tokens 0..7, 8..15];
// `at`: the first of 32 tokens. kByUnits: as above, the two units side by side, as in an A fragment; otherwise the tokens.
template <class S, class V, bool kByUnits>
__device__ __forceinline__ void load_values(uint32_t (&word)[2][V::kBits / 4][2], int step, uint32_t at, int slice,
                                            int lane) {
  using Layout = typename S::VSwizzle;
  constexpr int kWords = V::kBits / 4;
  if constexpr (kWords == 1) {
    if (step == 0) {
      uint32_t r[4];
      load_tiles_transposed(r, at + lane * Layout::kPitch + ((slice ^ Layout::of(lane)) << 4));
      word[0][0][0] = r[0], word[0][0][1] = r[1], word[1][0][0] = r[2], word[1][0][1] = r[3];
    }
  } else {
    int first = slice * kWords;
    if constexpr (Layout::kParts > 1) {
      at += first / Layout::kPartUnits * S::kStageTokens * Layout::kPitch;
      first %= Layout::kPartUnits;
    }
#pragma unroll
    for (int unit = 0; unit < kWords; unit += 2) {
      const int row = 16 * step + (kByUnits ? lane % 8 + lane / 16 * 8 : lane % 16);
      const int high = kByUnits ? lane / 8 % 2 : lane / 16;
      const int from = (first + unit + high) ^ Layout::of(row);
      uint32_t r[4];
      load_tiles_transposed(r, at + row * Layout::kPitch + (from << 4));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) word[step][unit + j][half] = r[kByUnits ? j + 2 * half : 2 * j + half];
      }
    }
  }
}

// log2 of a token's scale, rounded up to the next whole number: enough to bound its weight. 0 is not seen and has no weight.
__device__ __forceinline__ float scale_exponent(uint32_t raw) {
  const uint32_t exponent = (raw & 0x7f80) >> 7;
  return __uint_as_float(0x4b000000 | exponent) - (0x1p23f + 126.0f);
}

// cap * tanh(logit / cap), in units of log2(e).
__device__ __forceinline__ float soft_cap(float x, float softcap) {
  const float cap = softcap * kLog2E;
  const float e = exp2_fast(fabsf(x) * __fdividef(-2.0f, softcap));
  return copysignf(cap * __fdividef(1.0f - e, 1.0f + e), x);
}

// The least whole power of 2 that bounds weights of which the largest is 2^highest, or what it was before.
__device__ __forceinline__ int round_max(float highest, int before) {
  if (highest == -INFINITY) return before;
  const int max = static_cast<int>(fminf(fmaxf(ceilf(highest), -0x1p28f), 0x1p28f));
  return max > before ? max : before;
}

}  // namespace foldkv::cuda

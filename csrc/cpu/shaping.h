// Shaped rounding on the CPU; the definition is quant/shaping.py. All of it is whole numbers below 2^24, exact in floats.
#pragma once

#include "core/shaping.h"
#include "cpu/simd.h"
#include "cpu/tables.h"

namespace foldkv::FOLDKV_ISA {

// Rows of so many bits are shaped on the grid of their min .. max.
constexpr int kShapeBits = 8;

// The matrix of a head, or null where its rows round plainly.
inline const int8_t* shaping_of(const Cache& cache, int head, int d) {
  if (cache.shaping == nullptr) return nullptr;
  const int8_t* matrix = cache.shaping + int64_t{head} * d * d;
  return matrix[0] != 0 ? matrix : nullptr;
}

// slope[c] = sum over k of matrix[c][k] error[k].
inline void shape_slope(const int8_t* matrix, const float* error, int d, float* slope) {
  alignas(64) int16_t words[kMaxHeadDim] = {};  // a unit that d fills by half ends in zeros
  for (int c = 0; c < d; ++c) words[c] = static_cast<int16_t>(error[c]);
  const int whole = d / cpu::kUnit;
  for (int c = 0; c < d; c += 16) {
    I sums[16];
    for (int r = 0; r < 16; ++r) {
      const int8_t* row = matrix + int64_t{c + r} * d;
      sums[r] = izero();
      for (int u = 0; u < whole; ++u) {
        sums[r] = madd(sums[r], widen_i8(row + u * cpu::kUnit), wload(words + u * cpu::kUnit));
      }
      if (d % cpu::kUnit != 0) {
        int8_t half[cpu::kUnit] = {};
        std::memcpy(half, row + whole * cpu::kUnit, cpu::kUnit / 2);
        sums[r] = madd(sums[r], widen_i8(half), wload(words + whole * cpu::kUnit));
      }
    }
    store(slope + c, to_float(sum16(sums)));
  }
}

// Moves whole codes of 0 .. most, `error` units of `step` to a code away from the row, one at a time.
inline void shape_codes(const int8_t* matrix, const float* error, float step, float most, int d, float* code) {
  alignas(64) float slope[kMaxHeadDim], own[kMaxHeadDim], gain[kMaxHeadDim];
  shape_slope(matrix, error, d, slope);
  for (int c = 0; c < d; ++c) own[c] = step * static_cast<float>(matrix[int64_t{c} * d + c]);
  for (int flip = 0; flip < kShapeFlips; ++flip) {
    F best_lanes = splat(0.0f);
    for (int c = 0; c < d; c += 16) {
      const F pull = load(slope + c), at = load(code + c);
      // One code up where the slope is negative, else one down.
      const F room = splat(most) - at;
      const F lowered = splat(2.0f) * abs(pull) - load(own + c);
      const F down = zero_below(zero_below(lowered, pull, 0.0f), at, 1.0f);
      const F up = zero_below(zero_below(lowered, splat(0.0f) - pull, 1.0f), room, 1.0f);
      const F better = max(max(down, up), splat(0.0f));
      store(gain + c, better);
      best_lanes = max(best_lanes, better);
    }
    const float best = hmax(best_lanes);
    if (best <= 0.0f) break;
    int c = 0;
    while (gain[c] != best) ++c;
    const float sign = slope[c] < 0.0f ? 1.0f : -1.0f, moved = sign * step;
    code[c] += sign;
    const int8_t* row = matrix + int64_t{c} * d;
    for (int k = 0; k < d; ++k) slope[k] += moved * static_cast<float>(row[k]);
  }
}

}  // namespace foldkv::FOLDKV_ISA

// Steered rounding on the CPU; the definition is quant/steering.py.
#pragma once

#include "core/steering.h"
#include "cpu/simd.h"

namespace foldkv::FOLDKV_ISA {

// A direction of queries as whole numbers; false where it is none.
inline bool read_direction(const float* from, int d, float* direction) {
  F largest = splat(0.0f);
  for (int c = 0; c < d; c += 16) {
    const F whole = min(max(rint(load(from + c)), splat(-kMaxDirection)), splat(kMaxDirection));
    store(direction + c, whole);
    largest = max(largest, abs(whole));
  }
  return hmax(largest) > 0.0f;
}

// Exact sum of products of whole numbers, each below 2^20.
inline int64_t whole_dot(const float* a, const float* b, int d) {
  int64_t sum = 0;
  for (int c = 0; c < d; c += 16) {
    float lanes[16];
    store(lanes, load(a + c) * load(b + c));
    for (float lane : lanes) sum += static_cast<int64_t>(lane);
  }
  return sum;
}

// What a flip's own part along x costs.
inline float steer_weight(const float* x, int d) {
  const int64_t square = whole_dot(x, x, d);
  return kSteerWeight * kSteerUnits / static_cast<float>(square < 1 ? 1 : square);
}

// Codes of a row at `place`, in codes.
inline void steer_row(const float* place, const float* direction, int d, int32_t* codes) {
  alignas(64) float row[kMaxHeadDim], error[kMaxHeadDim], keep[kMaxHeadDim], code[kMaxHeadDim], rank[kMaxHeadDim];
  for (int c = 0; c < d; c += 16) {
    const F at = load(place + c), nearest = min(max(rint(at), splat(0.0f)), splat(15.0f));
    const F bounded = min(max(at, splat(kSteerLeast)), splat(kSteerMost));
    const F unit = rint((bounded - splat(kSteerMiddle)) * splat(kSteerUnits));
    store(row + c, unit);
    store(code + c, nearest);
    store(error + c, nearest * splat(kSteerUnits) - splat(kSteerUnits * kSteerMiddle) - unit);
  }
  const float row_weight = steer_weight(row, d), aim_weight = steer_weight(direction, d);
  int64_t along_row = whole_dot(error, row, d), along_aim = whole_dot(error, direction, d);
  for (int c = 0; c < d; c += 16) {
    const F unit = load(row + c), aim = load(direction + c);
    store(keep + c, unit * unit * splat(row_weight) + aim * aim * splat(aim_weight));
  }
  for (int flip = 0; flip < kSteerFlips; ++flip) {
    const float row_pull = static_cast<float>(along_row) * row_weight * (2.0f / kSteerUnits);
    const float aim_pull = static_cast<float>(along_aim) * aim_weight * (2.0f / kSteerUnits);
    F most = splat(0.0f);
    for (int c = 0; c < d; c += 16) {
      const F miss = load(error + c), step = splat(0.0f) - copy_sign(splat(1.0f), miss);
      const F along = load(row + c) * splat(row_pull) + load(direction + c) * splat(aim_pull);
      const F change = load(keep + c) + (splat(kSteerUnits) - splat(2.0f) * abs(miss)) + step * along;
      const F next = load(code + c) + step;
      F lowered = splat(0.0f) - rint(change * splat(kSteerRanks));
      lowered = zero_below(zero_below(lowered, next, 0.0f), splat(15.0f) - next, 0.0f);
      store(rank + c, lowered);
      most = max(most, lowered);
    }
    const float best = hmax(most);
    if (best <= 0.0f) break;
    int c = 0;
    while (rank[c] != best) ++c;
    const float step = error[c] < 0.0f ? 1.0f : -1.0f, moved = step * kSteerUnits;
    code[c] += step;
    error[c] += moved;
    along_row += static_cast<int64_t>(moved * row[c]);
    along_aim += static_cast<int64_t>(moved * direction[c]);
  }
  for (int c = 0; c < d; c += 16) istore(codes + c, to_int(load(code + c)));
}

}  // namespace foldkv::FOLDKV_ISA

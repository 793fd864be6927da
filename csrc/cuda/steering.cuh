// Steered rounding of static rows on a GPU. The definition is quant/steering.py.
#pragma once

#include <cstdint>

#include "core/steering.h"
#include "cuda/rows.cuh"

namespace foldkv::cuda {

__device__ __forceinline__ float whole_direction(float x) {
  return rintf(fminf(fmaxf(x, -kMaxDirection), kMaxDirection));
}

template <int V>
__device__ __forceinline__ bool is_direction(const float (&direction)[V]) {
  bool any = false;
#pragma unroll
  for (int i = 0; i < V; ++i) any = any || whole_direction(direction[i]) != 0.0f;
  return any;
}

template <int G>
__device__ __forceinline__ int row_sum(float whole) {
  int sum = __float2int_rn(whole);
#pragma unroll
  for (int step = G / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  return sum;
}

// What a flip's own part along a vector of that square costs.
__device__ __forceinline__ float steer_weight(int square) {
  return __fdiv_rn(kSteerWeight * kSteerUnits, __int2float_rn(square < 1 ? 1 : square));
}

// Turns the nearest codes of a row, each with 2^23 in its bits, into steered ones. place: in codes. Sums are of whole numbers:
// in a lane below 2^24, in a row below 2^31. A change compares as rank * 512 + channel, ranks lie within 2^22.
//
// A code goes to and fro between two neighbours, and with it the signs of all that its moves are worth.
template <int V, int G>
__device__ __forceinline__ void steer_row(const float (&place)[V], const float (&direction)[V], int c0, bool active,
                                          uint32_t (&code)[V]) {
  float row[V], aim[V], gain[V], keep[V];  // by what the next move changes the products; its own part of the change
  uint32_t packed[V / 8] = {},
                      up = 0;  // the codes, and which go up next, as registers are worth more than instructions
  float along_row = 0.0f, along_aim = 0.0f, row_square = 0.0f, aim_square = 0.0f;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float bounded = fminf(fmaxf(place[i], kSteerLeast), kSteerMost);
    row[i] = active ? rintf(__fmul_rn(__fsub_rn(bounded, kSteerMiddle), kSteerUnits)) : 0.0f;
    const float nearest = __fsub_rn(__uint_as_float(code[i]), 0x1p23f);
    const float error = active ? __fmaf_rn(nearest, kSteerUnits, -kSteerUnits * kSteerMiddle) - row[i] : 0.0f;
    packed[i / 8] |= (code[i] & 15) << (4 * i % 32);
    aim[i] = whole_direction(direction[i]);
    row_square = __fmaf_rn(row[i], row[i], row_square);
    aim_square = __fmaf_rn(aim[i], aim[i], aim_square);
    along_row = __fmaf_rn(error, row[i], along_row);
    along_aim = __fmaf_rn(error, aim[i], along_aim);
    gain[i] = error;
  }
  const float row_weight = steer_weight(row_sum<G>(row_square)), aim_weight = steer_weight(row_sum<G>(aim_square));
  int row_total = row_sum<G>(along_row), aim_total = row_sum<G>(along_aim);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    // Without a neighbour on the side of its error: as a channel at 0, which never pays.
    const bool stuck = row[i] > kSteerUnits * kSteerMiddle || row[i] <= -kSteerUnits * kSteerMiddle;
    if (stuck) row[i] = aim[i] = gain[i] = 0.0f;
    keep[i] =
        __fadd_rn(__fmul_rn(__fmul_rn(row[i], row[i]), row_weight), __fmul_rn(__fmul_rn(aim[i], aim[i]), aim_weight));
    const bool rises = gain[i] < 0.0f;
    if (rises) up |= 1u << i;
    if (!rises) row[i] = -row[i], aim[i] = -aim[i];
    gain[i] = __fmaf_rn(fabsf(gain[i]), -2.0f, kSteerUnits);
  }
#pragma unroll 1
  for (int flip = 0; flip < kSteerFlips; ++flip) {
    const float row_pull = __fmul_rn(__fmul_rn(__int2float_rn(row_total), row_weight), 2.0f / kSteerUnits);
    const float aim_pull = __fmul_rn(__fmul_rn(__int2float_rn(aim_total), aim_weight), 2.0f / kSteerUnits);
    constexpr uint32_t kMagic = 0x4b400000;  // the bits of 1.5 * 2^23, with which a sum is rounded to whole ranks
    int best = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float along = __fadd_rn(__fmul_rn(row[i], row_pull), __fmul_rn(aim[i], aim_pull));
      const float change = __fadd_rn(__fadd_rn(keep[i], gain[i]), along);
      const uint32_t rank = __float_as_uint(__fmaf_rn(change, kSteerRanks, 0x1.8p23f));
      best = min(best, static_cast<int>(rank * 512 + (c0 + i - kMagic * 512)));
    }
#pragma unroll
    for (int step = G / 2; step > 0; step /= 2) best = min(best, __shfl_xor_sync(kFullWarp, best, step));
    if (!__any_sync(kFullWarp, best < 0)) break;
    const int first = best < 0 ? best & 511 : -V, at = first - c0;
    float moved_row = 0.0f, moved_aim = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (at == i) {
        moved_row = row[i], moved_aim = aim[i];
        row[i] = -row[i], aim[i] = -aim[i], gain[i] = -gain[i];
      }
    }
    if (at >= 0 && at < V) {
      const uint32_t step = (up >> at & 1) != 0 ? 1u : ~0u;
#pragma unroll
      for (int word = 0; word < V / 8; ++word) {
        packed[word] += at / 8 == word ? step << (4 * at % 32) : 0;
      }
      up ^= 1u << at;
    }
    // Both in one exchange: |row| is below 2^10, |aim| below 2^9.
    const int moved =
        __shfl_sync(kFullWarp, __float2int_rn(__fmaf_rn(moved_row, 1024.0f, moved_aim)), first < 0 ? 0 : first / V, G);
    const int moved_by_aim = (moved + 512 & 1023) - 512;
    if (first >= 0) {
      row_total += (moved - moved_by_aim >> 10) * 64;
      aim_total += moved_by_aim * 64;
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) code[i] = __float_as_uint(0x1p23f) | (packed[i / 8] >> (4 * i % 32) & 15);
}

}  // namespace foldkv::cuda

// Shaped rounding of dynamic rows on a GPU. The definition is quant/shaping.py.
//
// A block's rows share the head, so its matrix Q lies in shared memory, and the products Q e of all its rows are taken at once
// on tensor cores: every warp has some channels of all rows. The flips follow in the lanes that hold the row.
#pragma once

#include <cstdint>

#include "core/shaping.h"
#include "cuda/ptx.cuh"
#include "cuda/row_codes.cuh"
#include "cuda/rows.cuh"

namespace foldkv::cuda {

// The dynamic shared memory of a launch.
__device__ __forceinline__ uint8_t* shaping_shared() {
  extern __shared__ uint4 shaping_memory[];
  return reinterpret_cast<uint8_t*>(shaping_memory);
}

// What a block that shapes has: rows in G lanes of 8 channels, 8 rows to a tile of products.
template <int G>
struct ShapeLayout {
  static constexpr int kChannels = 8 * G;
  static constexpr int kWarps = G == 32 ? 8 : 4;
  static constexpr int kRows = kWarps * 32 / G;
  static constexpr int kRowTiles = kRows / 8;
  static constexpr int kTiles = kChannels / 16 / kWarps;  // of channels, in a warp
  // Strides that spread eight rows over all banks.
  static constexpr int kErrorBytes = kChannels + 16;
  static constexpr int kPullFloats = kChannels + 4;
  FOLDKV_HD static constexpr int matrix_row(int d) { return d % 32 == 0 ? d + 16 : d; }
  FOLDKV_HD static constexpr int shared_bytes(int d) {
    return d * matrix_row(d) + kRows * (kErrorBytes + kPullFloats * static_cast<int>(sizeof(float)));
  }
};

// c[16x8] += a[16x32] b[32x8] of signed bytes. Lane (g = l / 4, t = l % 4): a = rows g, g+8, g, g+8 of columns 4t (first two),
// 4t+16 (last two), four columns a register; b = column g, rows 4t and 4t+16; c as of ptx.cuh.
__device__ __forceinline__ void multiply_bytes(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Whole numbers within a signed byte, as bytes.
__device__ __forceinline__ void pack_bytes(const float (&x)[8], uint32_t (&words)[2]) {
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    uint32_t byte[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) byte[i] = __float_as_uint(__fadd_rn(x[4 * w + i], 0x1.8p23f));
    words[w] = __byte_perm(__byte_perm(byte[0], byte[1], 0x40), __byte_perm(byte[2], byte[3], 0x40), 0x5410);
  }
}

// The errors of a row's codes as bytes, and how many of their units a code's step has. `chosen`: the row is one to shape, and
// the lane has channels of it; others have no errors.
template <int V>
__device__ __forceinline__ float row_errors(const CodeRange& range, const Searched<V>& found, const float (&place)[V],
                                            bool chosen, const uint32_t (&code)[V], uint32_t (&error)[2]) {
  float unit[V], step = kShapeUnits;
  if (range.searches) {
    step = found.plain ? search_grid(0).step : search_grid(1).step;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      unit[i] = __fmaf_rn(__fsub_rn(__uint_as_float(code[i]), 0x1p23f), step, __fsub_rn(found.start, found.unit[i]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float at = rintf(__fmul_rn(place[i], kShapeUnits));
      unit[i] = __fmaf_rn(__fsub_rn(__uint_as_float(code[i]), 0x1p23f), kShapeUnits, -at);
      unit[i] = fminf(fmaxf(unit[i], -kShapeMost), kShapeMost);
    }
  }
  pack_bytes(unit, error);
  if (!chosen) error[0] = error[1] = 0;
  return step;
}

// Ask for the matrix of a head; `matrix` is 16-byte aligned.
template <int G>
__device__ __forceinline__ void fetch_matrix(uint8_t* shared, const int8_t* matrix, int d) {
  const uint32_t to = shared_address(shared);
  const int units = d / 16, row = ShapeLayout<G>::matrix_row(d);
  for (int c = threadIdx.x / G; c < d; c += ShapeLayout<G>::kRows) {
    const int unit = threadIdx.x % G;
    if (unit < units) copy_async(to + c * row + unit * 16, matrix + c * d + unit * 16);
  }
  copy_commit();
}

// Q e of the block's rows. errors: of this lane's channels, as bytes. The whole block calls it.
template <int G>
__device__ __forceinline__ void pull_rows(uint8_t* shared, int d, const uint32_t (&errors)[2], float (&pull)[8]) {
  using Layout = ShapeLayout<G>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = threadIdx.x / G, c0 = threadIdx.x % G * 8;
  const int matrix_row = Layout::matrix_row(d);
  uint8_t* const error_rows = shared + d * matrix_row;
  float* const pulls = reinterpret_cast<float*>(error_rows + Layout::kRows * Layout::kErrorBytes);
  *reinterpret_cast<uint2*>(error_rows + row * Layout::kErrorBytes + c0) = make_uint2(errors[0], errors[1]);
  copy_wait<0>();
  __syncthreads();
  int sum[Layout::kTiles][Layout::kRowTiles][4] = {};
  const uint32_t matrix_at = shared_address(shared) + (warp * 16 + lane % 16) * matrix_row + lane / 16 * 16;
  const uint32_t error_at = shared_address(error_rows) + lane % 8 * Layout::kErrorBytes + lane / 8 % 2 * 16;
#pragma unroll
  for (int k = 0; k < Layout::kChannels; k += 32) {
    if (k >= d) break;
    uint32_t b[Layout::kRowTiles][2];
#pragma unroll
    for (int n = 0; n < Layout::kRowTiles; ++n) load_tiles(b[n], error_at + n * 8 * Layout::kErrorBytes + k);
#pragma unroll
    for (int m = 0; m < Layout::kTiles; ++m) {
      if ((m * Layout::kWarps + warp) * 16 >= d) break;
      uint32_t a[4];
      load_tiles(a, matrix_at + m * Layout::kWarps * 16 * matrix_row + k);
#pragma unroll
      for (int n = 0; n < Layout::kRowTiles; ++n) multiply_bytes(sum[m][n], a, b[n]);
    }
  }
#pragma unroll
  for (int m = 0; m < Layout::kTiles; ++m) {
    const int channel = (m * Layout::kWarps + warp) * 16 + lane / 4;
    if (channel >= d) break;
#pragma unroll
    for (int n = 0; n < Layout::kRowTiles; ++n) {
      float* const to = pulls + (n * 8 + lane % 4 * 2) * Layout::kPullFloats + channel;
      to[0] = __int2float_rn(sum[m][n][0]);
      to[Layout::kPullFloats] = __int2float_rn(sum[m][n][1]);
      to[8] = __int2float_rn(sum[m][n][2]);
      to[Layout::kPullFloats + 8] = __int2float_rn(sum[m][n][3]);
    }
  }
  __syncthreads();
  const float4* const from = reinterpret_cast<const float4*>(pulls + row * Layout::kPullFloats + c0);
  const float4 low = from[0], high = from[1];
  pull[0] = low.x, pull[1] = low.y, pull[2] = low.z, pull[3] = low.w;
  pull[4] = high.x, pull[5] = high.y, pull[6] = high.z, pull[7] = high.w;
}

// The least of a row, at most 0; `going`: whether that of any row of the warp is below 0.
template <int G>
__device__ __forceinline__ int row_least(int x, bool& going) {
  if constexpr (G == 32) {
    const int least = __reduce_min_sync(kFullWarp, x);
    going = least < 0;
    return least;
  } else if constexpr (G == 16) {
    const bool upper = (threadIdx.x & 16) != 0;
    const int first = __reduce_min_sync(kFullWarp, upper ? 0 : x), second = __reduce_min_sync(kFullWarp, upper ? x : 0);
    going = (first | second) < 0;
    return upper ? second : first;
  } else {
#pragma unroll
    for (int step = G / 2; step > 0; step /= 2) x = min(x, __shfl_xor_sync(kFullWarp, x, step));
    going = __any_sync(kFullWarp, x < 0);
    return min(x, 0);
  }
}

__device__ __forceinline__ float signed_byte(uint32_t word, int i) {
  return static_cast<float>(static_cast<int8_t>(word >> (8 * i)));
}

// Flips codes, each with 2^23 in its bits, while e' Q e falls, e in units of which a code's step has `step`. pull: Q e.
// All numbers are whole: pulls lie within 2^20, 8 times a change and its channel in the lane within 2^24. Changes compare as
// (change * 512 + channel) * 2 + direction, within 2^31.
template <int G>
__device__ __forceinline__ void shape_row(const uint8_t* shared, int d, float step, uint32_t top, bool chosen,
                                          float (&pull)[8], uint32_t (&code)[8]) {
  const int matrix_row = ShapeLayout<G>::matrix_row(d), c0 = threadIdx.x % G * 8;
  float keep[8];  // 8 times the part of a change that is the flip's own, and the channel, negated
  uint32_t packed[2] = {}, lowest = 0, highest = 0;  // codes; channels of code 0, and of the top one
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int c = chosen ? c0 + i : 0;
    const float own = static_cast<float>(static_cast<int8_t>(shared[c * matrix_row + c]));
    keep[i] = __fmaf_rn(own, step * -8.0f, -static_cast<float>(i));
    const uint32_t mine = code[i] & 255;
    packed[i / 4] |= mine << (8 * i % 32);
    if (mine == 0 || !chosen) lowest |= 1u << i;
    if (mine == top || !chosen) highest |= 1u << i;
  }
#pragma unroll 1
  for (int flip = 0; flip < kShapeFlips; ++flip) {
    uint32_t up = 0;
#pragma unroll
    for (int i = 7; i >= 0; --i) up = __funnelshift_l(__float_as_uint(pull[i]), up, 1);
    const uint32_t stuck = (up & highest) | (~up & lowest);
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float fall = __fmaf_rn(fabsf(pull[i]), 16.0f, keep[i]);
      if ((stuck >> i & 1) == 0) most = fmaxf(most, fall);
    }
    const int fall = __float2int_rn(most), i = -fall & 7;
    const int rank = fall * -128 - i * 126 + 2 * c0 + static_cast<int>(up >> i & 1);
    bool going;
    const int best = row_least<G>(rank, going);
    if (!going) break;
    const int channel = best >> 1 & 511, at = channel - c0;
    const bool rises = (best & 1) != 0;
    if (best < 0 && at >= 0 && at < 8) {
      const int shift = at % 4 * 8;
      const uint32_t word = (at < 4 ? packed[0] : packed[1]) + ((rises ? 1u : ~0u) << shift), now = word >> shift & 255;
      (at < 4 ? packed[0] : packed[1]) = word;
      lowest = lowest & ~(1u << at) | (now == 0 ? 1u << at : 0);
      highest = highest & ~(1u << at) | (now == top ? 1u << at : 0);
    }
    const float moved = best < 0 ? (rises ? step : -step) : 0.0f;
    const uint2 row = *reinterpret_cast<const uint2*>(shared + channel * matrix_row + c0);
#pragma unroll
    for (int i = 0; i < 8; ++i) pull[i] = __fmaf_rn(signed_byte(i < 4 ? row.x : row.y, i % 4), moved, pull[i]);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) code[i] = __float_as_uint(0x1p23f) | (packed[i / 4] >> (8 * i % 32) & 255);
}

}  // namespace foldkv::cuda

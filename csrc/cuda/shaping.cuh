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
  static constexpr int kPullInts = kChannels + 4;
  FOLDKV_HD static constexpr int matrix_row(int d) { return d % 32 == 0 ? d + 16 : d; }
  FOLDKV_HD static constexpr int shared_bytes(int d) {
    return d * matrix_row(d) + kRows * (kErrorBytes + kPullInts * static_cast<int>(sizeof(int)));
  }
};

// c[16x8] += a[16x32] b[32x8] of signed bytes. Lane (g = l / 4, t = l % 4): a = rows g, g+8, g, g+8 of columns 4t (first two),
// 4t+16 (last two), four columns a register; b = column g, rows 4t and 4t+16; c as of ptx.cuh.
__device__ __forceinline__ void multiply_bytes(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
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
__device__ __forceinline__ int row_errors(const CodeRange& range, const Searched<V>& found, const float (&place)[V],
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
  return static_cast<int>(step);
}

// Ask for the matrix of a head; `matrix` is 16-byte aligned.
template <int G>
__device__ __forceinline__ void fetch_matrix(uint8_t* shared, const int8_t* matrix, int d) {
  constexpr int kUnits = ShapeLayout<G>::kChannels / 16;  // of 16 bytes in a row of kChannels
  const int unit = threadIdx.x % kUnits, row = ShapeLayout<G>::matrix_row(d);
  const uint32_t to = shared_address(shared) + unit * 16;
#pragma unroll 1
  for (int c = threadIdx.x / kUnits; c < d; c += ShapeLayout<G>::kWarps * 32 / kUnits) {
    if (unit < d / 16) copy_async(to + c * row, matrix + c * d + unit * 16);
  }
  copy_commit();
}

// Q e of the block's rows. errors: of this lane's channels, as bytes. The whole block calls it. Returns where the lane has 32
// bytes of its own, until the next call.
template <int G>
__device__ __forceinline__ uint32_t pull_rows(uint8_t* shared, int d, const uint32_t (&errors)[2], int (&pull)[8]) {
  using Layout = ShapeLayout<G>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = threadIdx.x / G, c0 = threadIdx.x % G * 8;
  const int matrix_row = Layout::matrix_row(d);
  uint8_t* const error_rows = shared + d * matrix_row;
  int* const pulls = reinterpret_cast<int*>(error_rows + Layout::kRows * Layout::kErrorBytes);
  *reinterpret_cast<uint2*>(error_rows + row * Layout::kErrorBytes + c0) = make_uint2(errors[0], errors[1]);
  copy_wait<0>();
  __syncthreads();
  // Columns of the matrix past d are whatever follows the row, and meet errors of 0.
  const uint32_t error_at = shared_address(error_rows) + lane % 8 * Layout::kErrorBytes + lane / 8 * 16;
#pragma unroll
  for (int m = 0; m < Layout::kTiles; ++m) {
    const int first = (m * Layout::kWarps + warp) * 16;
    if (first >= d) break;
    int sum[Layout::kRowTiles][4] = {};
    const uint32_t matrix_at = shared_address(shared) + (first + lane % 16) * matrix_row + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < Layout::kChannels; k += 64) {
      uint32_t matrix[2][4];
      load_tiles(matrix[0], matrix_at + k);
      load_tiles(matrix[1], matrix_at + k + 32);
#pragma unroll
      for (int n = 0; n < Layout::kRowTiles; ++n) {
        uint32_t error[4];
        load_tiles(error, error_at + n * 8 * Layout::kErrorBytes + k);
        multiply_bytes(sum[n], matrix[0], error[0], error[1]);
        multiply_bytes(sum[n], matrix[1], error[2], error[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < Layout::kRowTiles; ++n) {
      int* const to = pulls + (n * 8 + lane % 4 * 2) * Layout::kPullInts + first + lane / 4;
      to[0] = sum[n][0], to[Layout::kPullInts] = sum[n][1];
      to[8] = sum[n][2], to[Layout::kPullInts + 8] = sum[n][3];
    }
  }
  __syncthreads();
  const int4* const from = reinterpret_cast<const int4*>(pulls + row * Layout::kPullInts + c0);
  const int4 low = from[0], high = from[1];
  pull[0] = low.x, pull[1] = low.y, pull[2] = low.z, pull[3] = low.w;
  pull[4] = high.x, pull[5] = high.y, pull[6] = high.z, pull[7] = high.w;
  return shared_address(from);
}

// To the lane's own bytes and back, as registers are scarce while codes are flipped.
__device__ __forceinline__ void put_aside(uint32_t at, const float (&x)[8]) {
  const auto bits = [](float y) { return __float_as_uint(y); };
  store_shared(at, bits(x[0]), bits(x[1]), bits(x[2]), bits(x[3]));
  store_shared(at + 16, bits(x[4]), bits(x[5]), bits(x[6]), bits(x[7]));
}

__device__ __forceinline__ void take_back(uint32_t at, float (&x)[8]) {
  const uint4 low = load_shared(at), high = load_shared(at + 16);
  x[0] = __uint_as_float(low.x), x[1] = __uint_as_float(low.y);
  x[2] = __uint_as_float(low.z), x[3] = __uint_as_float(low.w);
  x[4] = __uint_as_float(high.x), x[5] = __uint_as_float(high.y);
  x[6] = __uint_as_float(high.z), x[7] = __uint_as_float(high.w);
}

__device__ __forceinline__ uint2 load_pair(uint32_t at) {
  uint2 r;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "r"(at) : "memory");
  return r;
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

// Flips codes, each with 2^23 in its bits, while e' Q e falls, e in units of which a code's step has `step`. pull: Q e, which
// is spent. The diagonal of Q is not negative, so a move against the pull never pays, and a code has the cheaper of both moves
// without being asked where its pull goes.
//
// In a lane moves compare as (change * 8 + channel in the lane) * 2 + whether the code rises, within 2^25; in a row as
// (change * 512 + channel) * 2 + that, within 2^31.
template <int G>
__device__ __forceinline__ void shape_row(const uint8_t* shared, int d, int step, uint32_t top, bool chosen,
                                          int (&pull)[8], uint32_t (&code)[8]) {
  constexpr int kNever = 1 << 30, kPull = 2 * 16;  // a pull's part of a change, as moves compare in a lane
  constexpr uint32_t kMagic = 0x4b000000;  // the bits of 2^23
  const int matrix_row = ShapeLayout<G>::matrix_row(d), c0 = threadIdx.x % G * 8;
  const uint8_t* const own = shared + (chosen ? c0 * (matrix_row + 1) : 0);
  const uint32_t columns = opaque(shared_address(shared) + (chosen ? c0 : 0));  // kept, as it is dear to have anew
  int rise[8], fall[8];  // a move's own part of the change
  uint32_t packed[2] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int keep = static_cast<int8_t>(own[i * (matrix_row + 1)]) * (16 * step) + (chosen ? 2 * i : kNever);
    rise[i] = code[i] != kMagic + top ? keep + 1 : kNever;
    fall[i] = code[i] != kMagic ? keep : kNever;
    packed[i / 4] |= (code[i] & 255) << (8 * i % 32);
    pull[i] *= chosen ? kPull : 0;
  }
#pragma unroll 1
  for (int flip = 0; flip < kShapeFlips; ++flip) {
    int least = 0, other = 0;  // two chains, as each step waits for the one before
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      least = __viaddmin_s32(rise[i], pull[i], least);
      other = __viaddmin_s32(fall[i], -pull[i], other);
    }
    least = min(least, other);
    bool going;
    const int best = row_least<G>(least * 64 - (least & 15) * 63 + 2 * c0, going);
    if (!going) break;
    const int twice = best & 1022, at = twice - 2 * c0;  // of the channel, and of where it is in the lane
    const uint2 row = load_pair(columns + twice * (matrix_row / 2));
    const bool rises = (best & 1) != 0;
    if (best < 0 && static_cast<unsigned>(at) < 16) {
      const int shift = at % 8 * 4;
      const uint32_t word = (at < 8 ? packed[0] : packed[1]) + ((rises ? 1u : ~0u) << shift);
      (at < 8 ? packed[0] : packed[1]) = word;
      const uint32_t now = word >> shift & 255, lower = rises ? now - 1 : now;  // the lower of the code's two places
      if (lower - 1 >= top - 2) {  // either is an end
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int keep = rises ? rise[i] - 1 : fall[i];
          if (at == 2 * i) rise[i] = now == top ? kNever : keep + 1;
          if (at == 2 * i) fall[i] = now == 0 ? kNever : keep;
        }
      }
    }
    const int sign = (best * 2 & 2) - 1 & best >> 31;  // 0 for a row that is done
    const int moved = sign * step * kPull, low = moved & 0xffff, high = moved << 16;
    pull[0] = __dp2a_lo(low, static_cast<int>(row.x), pull[0]);
    pull[1] = __dp2a_lo(high, static_cast<int>(row.x), pull[1]);
    pull[2] = __dp2a_hi(low, static_cast<int>(row.x), pull[2]);
    pull[3] = __dp2a_hi(high, static_cast<int>(row.x), pull[3]);
    pull[4] = __dp2a_lo(low, static_cast<int>(row.y), pull[4]);
    pull[5] = __dp2a_lo(high, static_cast<int>(row.y), pull[5]);
    pull[6] = __dp2a_hi(low, static_cast<int>(row.y), pull[6]);
    pull[7] = __dp2a_hi(high, static_cast<int>(row.y), pull[7]);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) code[i] = __byte_perm(packed[i / 4], kMagic, 0x7440 + i % 4);
}

}  // namespace foldkv::cuda

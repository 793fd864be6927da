// Repair of rows, and codes, scale and zero of dynamic ones on a GPU. The definitions are quant/reference.py and quant/dynamic.py.
#pragma once

#include <cstdint>

#include "core/dynamic.h"
#include "cuda/rows.cuh"

namespace foldkv::cuda {

// What an integer format's rows are laid on.
struct CodeRange {
  bool stored_zero;
  bool searches;  // the range of a row
  float top;  // the largest code
  float steps, inverse;  // what a dynamic range divides into, and 1 / steps
};

__device__ __forceinline__ float round_up_to_bf16(float x) {
  x = fminf(fmaxf(x, kMinScale), kMaxScale);
  return fminf(__uint_as_float((__float_as_uint(x) + 0xffff) & 0xffff0000u), kMaxScale);
}

template <int G>
__device__ __forceinline__ float row_max(float x) {
#pragma unroll
  for (int step = G / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}

// NaN becomes 0 and, in dynamic formats, an infinity the row's largest finite magnitude; counts what was met. Rare.
template <int V, int G>
__device__ __forceinline__ void repair(float (&x)[V], bool dynamic, bool valid, int64_t* nonfinite) {
  float bound = 0.0f;
  unsigned count = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float magnitude = fabsf(x[i]);
    if (magnitude <= 0x1.fffffep127f) {
      bound = fmaxf(bound, magnitude);
    } else {
      ++count;
    }
  }
  bound = row_max<G>(bound);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (x[i] != x[i]) x[i] = 0.0f;
    if (dynamic && fabsf(x[i]) > 0x1.fffffep127f) x[i] = copysignf(bound, x[i]);
  }
  count = __reduce_add_sync(kFullWarp, valid ? count : 0);
  if (nonfinite != nullptr && count > 0 && threadIdx.x % 32 == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(nonfinite), static_cast<unsigned long long>(count));
  }
}

// Least and greatest of a row from those of its lanes: even lanes gather the greatest, odd ones the least, then they swap.
template <int G>
__device__ __forceinline__ void row_range(float& low, float& high) {
  const bool odd = threadIdx.x % 2 != 0;
  float mine = odd ? -low : high;
  mine = fmaxf(mine, __shfl_xor_sync(kFullWarp, odd ? high : -low, 1));
#pragma unroll
  for (int step = G / 2; step > 1; step /= 2) mine = fmaxf(mine, __shfl_xor_sync(kFullWarp, mine, step));
  const float other = __shfl_xor_sync(kFullWarp, mine, 1);
  low = -(odd ? mine : other);
  high = odd ? other : mine;
}

// x / b, rounded once, for b of 8 significant bits, which a bf16 is: one correction of x * (1 / b) is exact (tried for all
// pairs of significands), unless the remainder underflows.
__device__ __forceinline__ float divide_short(float x, float b, float inverse) {
  const float near = __fmul_rn(x, inverse);
  return __fmaf_rn(__fmaf_rn(-b, near, x), inverse, near);
}

struct ScaleZero {
  float scale, zero;
};

// Scale and zero of a row from its least and greatest element, as stored: a bf16 and an fp16 value. Tiny: the row is so
// small that remainders may underflow.
template <bool Tiny>
__device__ __forceinline__ ScaleZero min_max_scale(const CodeRange& range, float low, float high) {
  const auto step = [&](float x) {
    return Tiny ? __fdiv_rn(x, range.steps) : divide_short(x, range.steps, range.inverse);
  };
  low = __fadd_rn(low, 0.0f);  // a zero is +0, whichever zero of the row came first
  const float absmax = fmaxf(fabsf(low), fabsf(high));
  const bool constant = low == high;
  if (!range.stored_zero) {
    const float scale = round_up_to_bf16(constant ? absmax : step(absmax));
    return {absmax == 0.0f ? 1.0f : scale, range.steps + 1.0f};
  }
  const float least = __fmul_rn(absmax, 1.0f / kMaxZero);
  float scale = round_up_to_bf16(fmaxf(__fsub_rn(step(high), step(low)), least));
  if (constant) {
    scale = absmax == 0.0f ? 1.0f : __uint_as_float(__float_as_uint(fmaxf(absmax, kMinScale)) & 0x7f800000u);
  }
  const float zero = Tiny ? __fdiv_rn(low, scale) : divide_short(low, scale, __frcp_rn(scale));
  return {scale, __half2float(__float2half_rn(-zero))};
}

// code + 2^23: the sum rounds half to even, and its low bits are the code.
__device__ __forceinline__ uint32_t code_bits(float quotient, float zero, float top) {
  const float code = fminf(fmaxf(__fadd_rn(quotient, zero), 0.0f), top);
  return __float_as_uint(__fadd_rn(code, 0x1p23f));
}

// Scale and zero of a dynamic row by its range, and its codes; x becomes where its elements lie, in codes. Scales stay below
// 2^110, as rows are cut to kMaxDynamic.
template <int V>
__device__ __forceinline__ ScaleZero row_codes(const CodeRange& range, float low, float high, float (&x)[V],
                                               uint32_t (&code)[V]) {
  ScaleZero row;
  float divisor;
  if (fmaxf(fabsf(low), fabsf(high)) >= 0x1p-50f) {
    row = min_max_scale<false>(range, low, high);
    divisor = row.scale;
  } else {  // a power of two lifts row and scale, exactly, to where remainders do not underflow
    row = min_max_scale<true>(range, low, high);
    divisor = __fmul_rn(row.scale, 0x1p60f);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = __fmul_rn(x[i], 0x1p60f);
  }
  const float inverse = __frcp_rn(divisor);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float quotient = divide_short(x[i], divisor, inverse);
    code[i] = code_bits(quotient, row.zero, range.top);
    x[i] = __fadd_rn(quotient, row.zero);
  }
  return row;
}

__device__ __forceinline__ bool is_searched(const CodeRange& range, float low, float high) {
  return range.searches && low <= 0.0f && high >= 0.0f && fmaxf(-low, high) >= kLeastSearched;
}

// x to the nearest whole number, half to even, for 0 <= x < 2^22.
__device__ __forceinline__ float round_small(float x) { return __fsub_rn(__fadd_rn(x, 0x1p23f), 0x1p23f); }

// The place of a unit on a grid as code + 2^23. Without `up` a half may go either way.
__device__ __forceinline__ float place_on(const SearchGrid& grid, float unit, float up) {
  const float part = __fmaf_rn(unit, 1.0f / (15.0f * grid.step), (up - grid.start) / (15.0f * grid.step));
  return __fmaf_rn(__saturatef(part), 15.0f, 0x1p23f);
}

// What a lane keeps of two sums, with the other lane's part of it.
template <class T>
__device__ __forceinline__ T trade(T keep, T give, int step) {
  return keep + __shfl_xor_sync(kFullWarp, give, step);
}

// A row on the grid that errs least.
template <int V>
struct Searched {
  float unit[V];
  float low, width;
  bool plain;  // the grid with the greater step
  float start;  // of the grid
};

// search_rows of quant/dynamic.py, for rows that is_searched; the result of others is of no use. Units and what is summed of
// them are whole numbers: squared errors below 2^22, products below 2^22 in a lane and 2^27 in a row. So sums are exact in any
// order. Lanes share the grids out among themselves: 12 exchanges for 16 lanes.
template <int V, int G>
__device__ __forceinline__ Searched<V> search_row(const float (&x)[V], float low, float high, bool active,
                                                  uint32_t (&code)[V]) {
  static_assert(kSearchGrids == 4 && G >= 4);
  const float width = __fsub_rn(high, low), inverse = __fdiv_rn(kSearchUnits, width);
  Searched<V> row{{}, low, width};
  float (&unit)[V] = row.unit;
  float error[kSearchGrids] = {};
#pragma unroll
  for (int i = 0; i < V; ++i) {
    unit[i] = round_small(__fmul_rn(__fsub_rn(x[i], low), inverse));
#pragma unroll
    for (int j = 0; j < kSearchGrids; ++j) {
      constexpr SearchGrid kPlain = search_grid(0);
      const SearchGrid grid = search_grid(j);
      const float place = j == 0 ? __fmaf_rn(unit[i], 1.0f / kPlain.step, 0x1p23f) : place_on(grid, unit[i], 0.0f);
      const float from = __fsub_rn(unit[i], grid.start);
      const float miss = __fmaf_rn(__fsub_rn(place, 0x1p23f), -grid.step, from);
      error[j] = __fmaf_rn(miss, miss, error[j]);
    }
  }
  const bool first = threadIdx.x & 1, second = threadIdx.x & 2;
#pragma unroll
  for (int j = 0; j < kSearchGrids; ++j) error[j] = active ? error[j] : 0.0f;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    error[j] = trade(first ? error[2 + j] : error[j], first ? error[j] : error[2 + j], 1);
  }
  float mine = trade(second ? error[1] : error[0], second ? error[0] : error[1], 2);
#pragma unroll
  for (int step = 4; step < G; step *= 2) mine = trade(mine, mine, step);
  float least = __fmaf_rn(mine, 4.0f, (first ? 2.0f : 0.0f) + (second ? 1.0f : 0.0f));  // the first of equals
#pragma unroll
  for (int step = 1; step < 4; step *= 2) least = fminf(least, __shfl_xor_sync(kFullWarp, least, step));
  const int best = static_cast<int>(__float_as_uint(__fadd_rn(least, 0x1p23f)) & 3);

  const SearchGrid grid = search_grid(best);
  const float factor = best == 0 ? 1.0f / 480.0f : 1.0f / 450.0f;
  const float shift = __fmul_rn(__fsub_rn(0.25f, grid.start), factor);  // a quarter unit sends halves up
#pragma unroll
  for (int i = 0; i < V; ++i) {
    code[i] = __float_as_uint(__fmaf_rn(__saturatef(__fmaf_rn(unit[i], factor, shift)), 15.0f, 0x1p23f));
  }
  row.plain = best == 0;
  row.start = grid.start;
  return row;
}

// Scale and zero of a searched row, by its codes.
template <int V, int G>
__device__ __forceinline__ ScaleZero search_scale(const Searched<V>& row, const uint32_t (&code)[V]) {
  const bool first = threadIdx.x & 1;
  const float inverse = __fdiv_rn(kSearchUnits, row.width);
  const float step_units = row.plain ? search_grid(0).step : search_grid(1).step;
  const float origin = __fmul_rn(__fsub_rn(0.0f, row.low), inverse), whole_origin = round_small(origin);
  const float start = __fsub_rn(row.start, whole_origin);
  float square = 0.0f, product = 0.0f;  // lanes past the row have the unit of 0, the origin
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float place = __fsub_rn(__uint_as_float(code[i]), 0x1p23f);
    const float truth = __fsub_rn(row.unit[i], whole_origin);
    square = __fmaf_rn(truth, truth, square);
    product = __fmaf_rn(truth, __fmaf_rn(place, step_units, start), product);
  }
  const int whole_square = __float2int_rn(square), whole_product = __float2int_rn(product);
  int sum = trade(first ? whole_product : whole_square, first ? whole_square : whole_product, 1);
#pragma unroll
  for (int step = 2; step < G; step *= 2) sum = trade(sum, sum, step);
  const int other = __shfl_xor_sync(kFullWarp, sum, 1);
  const float gain = __fdiv_rn(__int2float_rn(first ? other : sum), __int2float_rn(first ? sum : other));
  const float step = __fmul_rn(row.width, row.plain ? 32.0f / kSearchUnits : 30.0f / kSearchUnits);
  const float scale = __fmul_rn(step, fminf(fmaxf(gain, kMinGain), kMaxGain));
  const float zero = divide_short(__fsub_rn(origin, row.start), step_units, row.plain ? 1.0f / 32.0f : 1.0f / 30.0f);
  return {__bfloat162float(__float2bfloat16_rn(scale)), __half2float(__float2half_rn(zero))};
}

}  // namespace foldkv::cuda

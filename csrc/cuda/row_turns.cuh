// RoPE and rotation of rows with V channels in a lane.
#pragma once

#include <cstdint>

#include "cuda/rows.cuh"

namespace foldkv::cuda {

struct Rope {
  const float *cos, *sin;  // [positions, half]; null: none
  int half;                // pairs of a row
  bool interleaved;
  bool whole_lanes;  // a lane's channels turn alike, and their cos and sin are 16-byte aligned
};

template <int N>
__device__ __forceinline__ void load_floats(const float* from, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    const float4 held = __ldg(reinterpret_cast<const float4*>(from) + i);
    x[4 * i] = held.x, x[4 * i + 1] = held.y, x[4 * i + 2] = held.z, x[4 * i + 3] = held.w;
  }
}

// x cos + other sin, the second product negated for the first of a pair.
__device__ __forceinline__ float turn(float x, float other, float cos, float sin, bool first) {
  const float product = __fmul_rn(other, sin);
  return __fadd_rn(__fmul_rn(x, cos), first ? -product : product);
}

// RoPE of the channels c0 .. c0 + V - 1 of a row; `at` is where the row starts in `rows`, table its row of cos and sin.
template <int V>
__device__ __forceinline__ void turn_row(const Rope& p, const Rows& rows, int64_t at, int64_t table, int c0, int lane,
                                         bool valid, float (&x)[V]) {
  const int half = p.half;
  const bool turns = valid && c0 < 2 * half;
  if (p.whole_lanes && !p.interleaved) {
    const bool first = c0 < half;
    const int partner = c0 >= 2 * half ? lane : first ? lane + half / V : lane - half / V;
    const int64_t from = table + (first ? c0 : c0 - half);
#pragma unroll
    for (int part = 0; part < V; part += 4) {
      float other[4], cos[4], sin[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) other[i] = __shfl_sync(kFullWarp, x[part + i], partner);
      if (!turns) continue;
      load_floats(p.cos + from + part, cos);
      load_floats(p.sin + from + part, sin);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[part + i] = turn(x[part + i], other[i], cos[i], sin[i], first);
    }
  } else if (p.whole_lanes) {
    if (!turns) return;
    float cos[V / 2], sin[V / 2];
    load_floats(p.cos + table + c0 / 2, cos);
    load_floats(p.sin + table + c0 / 2, sin);
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      const float a = x[i], b = x[i + 1];
      x[i] = turn(a, b, cos[i / 2], sin[i / 2], true);
      x[i + 1] = turn(b, a, cos[i / 2], sin[i / 2], false);
    }
  } else {
    if (!turns) return;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int c = c0 + i;
      if (c >= 2 * half) break;
      const bool first = p.interleaved ? c % 2 == 0 : c < half;
      const int distance = p.interleaved ? 1 : half;
      const int pair = p.interleaved ? c / 2 : first ? c : c - half;
      const float other = load_element(rows.data, rows.dtype, at + (first ? c + distance : c - distance));
      x[i] = turn(x[i], other, __ldg(p.cos + table + pair), __ldg(p.sin + table + pair), first);
    }
  }
}

// The rotation of csrc/cuda/rows.cuh with V channels in a lane and blocks that need not fill a warp.
template <int V, int G>
__device__ __forceinline__ void rotate(float (&x)[V], int block, int lane, float norm) {
#pragma unroll
  for (int step = 1; step < V; step *= 2) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if ((i & step) == 0) {
        const float a = x[i], b = x[i + step];
        x[i] = __fadd_rn(a, b);
        x[i + step] = __fsub_rn(a, b);
      }
    }
  }
#pragma unroll
  for (int step = 1; step < G; step *= 2) {
    if (step * V >= block) break;
    const float sign = (lane & step) != 0 ? -1.0f : 1.0f;  // the product is exact, so the sum rounds once
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = __fmaf_rn(x[i], sign, __shfl_xor_sync(kFullWarp, x[i], step));
  }
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = __fmul_rn(x[i], norm);
}

}  // namespace foldkv::cuda

// The softmax state of a query row over some of its keys, and the row's way from a state to an output.
//
// The running maximum is a whole power of 2 (an int), so scaling a state never rounds: the merge of partials in chunk
// order gives the bits of the fold in registers, whoever computes which chunk.
#pragma once

#include "core/params.h"
#include "core/schedule.h"
#include "cuda/attend_shape.cuh"
#include "cuda/rows.cuh"

namespace foldkv::cuda {

constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// What two states are multiplied by to stand on one maximum.
struct Rescale {
  int max;
  float a, b;
};

__device__ __forceinline__ Rescale rescale(int max_a, int max_b) {
  const int max = max_a > max_b ? max_a : max_b;
  return {max, exp2_integer(max_a - max), exp2_integer(max_b - max)};
}

// a * scale_a + b * scale_b; the products are exact.
__device__ __forceinline__ float fold(float a, float b, const Rescale& r) { return fmaf(b, r.b, __fmul_rn(a, r.a)); }

// Parameters of one kv head: of a lane's channels, and how many floats further on those of the next kind are.
struct HeadParams {
  const float* lane;
  int stride;
  __device__ __forceinline__ float at(ParamRow row, int slice) const { return lane[row * stride + 32 * slice]; }
};

// Undo V's transform, weigh in the sink, normalise, write; x is used up. The state: x [D] and total, both times
// 2^(max - boost). Static zeros are still in x; dynamic ones are out.
template <int D>
__device__ __forceinline__ void finish_row(const AttendParams& p, bool integer, int row, int head,
                                           const HeadParams& params, int max, float total, float boost,
                                           float (&x)[D / 32], int lane) {
  if (integer) {
    const Format& format = p.v_cache.format;
    if (!format.dynamic) {
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        x[i] = (x[i] - params.at(kZero, i) * total) * params.at(kScale, i);
      }
    }
    if (format.rotate) hadamard_row<D>(x, lane);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      x[i] = x[i] * params.at(kBalance, i) + params.at(kMean, i) * total;
    }
  }
  if (p.sinks != nullptr) {
    const float sink = p.sinks[head] * kLog2E;
    const int sink_max = static_cast<int>(fminf(fmaxf(ceilf(sink), -0x1p28f), 0x1p28f));
    const Rescale r = rescale(max, sink_max);
    total = total * r.a + exp2f(sink - static_cast<float>(r.max) + boost);
    max = r.max;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) x[i] *= r.a;
  }
  const int64_t at = static_cast<int64_t>(row) * p.h_q + head;
  const bool empty = max == kEmpty;
  const float inverse = empty ? 0.0f : 1.0f / total;
#pragma unroll
  for (int i = 0; i < D / 32; ++i) x[i] = empty ? 0.0f : x[i] * inverse;
  store_lane(x, p.out, p.q.dtype, at * D + lane);
  if (p.lse != nullptr && lane == 0) {
    p.lse[at] = empty ? -INFINITY : (static_cast<float>(max) - boost + log2f(total)) * kLn2;
  }
}

__device__ __forceinline__ HeadParams head_params(const AttendParams& p, const Cache& cache, int kv_head, int lane) {
  return {cache.params + kv_head * p.d + lane, p.h_kv * p.d};
}
// Those of the block's kv head, which may lie in shared memory.
template <class S, int D>
__device__ __forceinline__ HeadParams block_params(const AttendParams& p, const Cache& cache, int at, int lane) {
  if constexpr (S::kKeepsParams) return {reinterpret_cast<const float*>(shared_memory + at) + lane, D};
  return head_params(p, cache, S::kv_head(), lane);
}
// Ask for the parameters of one kv head; 64 bytes a thread.
__device__ __forceinline__ void prefetch_params(const AttendParams& p, const float* params, int d, int kv_head,
                                                unsigned thread) {
  const int at = static_cast<int>(thread) * 16;
  if (at < kNumParamRows * d) prefetch(params + (at / d * p.h_kv + kv_head) * d + at % d);
}

// The same for row r of the current pass, by a warp: its output lies in shared memory.
template <class S, class V, int D>
__device__ __forceinline__ void finish_staged(const AttendParams& p, int q_row, const float* out, int r, int max,
                                              float total, int lane) {
  using Rows = typename S::Rows;
  float x[D / 32];
#pragma unroll
  for (int i = 0; i < D / 32; ++i) x[i] = out[32 * i + lane];
  // A query that is not finite gives NaN even where it sees nothing.
  const float bad = Rows::bad()[r];
  finish_row<D>(p, V::kInteger, q_row + Rows::token()[r], Rows::head()[r],
                block_params<S, D>(p, p.v_cache, S::kVParamsAt, lane), max == kEmpty && isnan(bad) ? 0 : max,
                total + bad, V::Math::kBoost, x, lane);
}

// What this thread has of the fold over a sequence's groups, in the workspace: two rows' states, and outputs.
template <int D>
__device__ __forceinline__ float* groups_at(const AttendParams& p, int seq, int kv_head) {
  const int64_t index = static_cast<int64_t>(seq) * p.h_kv + kv_head;
  return p.workspace + p.max_partials * partial_floats(p.h_q, D) + index * kGroupFloats + threadIdx.x;
}

// A partial's state: twice its maximum, and 1 more where it begins a group of chunks, as the bits of an int; and its total.
__device__ __forceinline__ float2 pack_state(int max, float total, bool starts_group) {
  return make_float2(__int_as_float(2 * max + (starts_group ? 1 : 0)), total);
}
__device__ __forceinline__ int max_of(float2 state) { return __float_as_int(state.x) >> 1; }
__device__ __forceinline__ bool starts_group(float2 state) { return (__float_as_int(state.x) & 1) != 0; }

// Where the partial of one query token and head lies: its state, and its output.
struct PartialAt {
  float2* state;
  float* out;
};

__device__ __forceinline__ PartialAt partial_at(const AttendParams& p, int64_t partial, int head, int d) {
  const int64_t index = partial * p.h_q + head;
  return {reinterpret_cast<float2*>(p.workspace) + index, p.workspace + p.max_partials * p.h_q * 2 + index * d};
}

}  // namespace foldkv::cuda

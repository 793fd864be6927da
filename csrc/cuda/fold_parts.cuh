// How partials become a row: in chunk order, each into its group of chunks, the groups into the row.
#pragma once

#include "cuda/finish.cuh"

namespace foldkv::cuda {

constexpr int kFactors = 32;  // partials that a warp works out together

// What folding one partial into its group takes.
struct alignas(16) Factor {
  float group, self, total;  // what the group has so far and the partial are multiplied by; the partial's total
  int before;  // maximum of the group before the partial, that of the group it begins or goes on with excepted
};

__device__ __forceinline__ float2 empty_state() { return pack_state(kEmpty, 0.0f, false); }

// Sets the factors of 32 partials, one a lane, in chunk order; returns which begin a group. `open`: the maximum of the group
// that goes on from the partials before; becomes that after these.
__device__ __forceinline__ unsigned set_factors(float2 state, int& open, Factor* factors, int lane) {
  const int max = max_of(state);
  const unsigned starts = __ballot_sync(kFullWarp, starts_group(state)), upto = starts & (kFullWarp >> (31 - lane));
  const int begin = upto != 0 ? 31 - __clz(upto) : 0;
  int group_max = max;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kFullWarp, group_max, step);
    if (lane - step >= begin) group_max = ::max(group_max, other);
  }
  if (upto == 0) group_max = ::max(group_max, open);
  int before = __shfl_up_sync(kFullWarp, group_max, 1);
  if (lane == 0) before = open;
  open = __shfl_sync(kFullWarp, group_max, 31);
  const Rescale r = rescale(starts_group(state) ? kEmpty : before, max);
  __syncwarp();  // all have left those before
  factors[lane] = {r.a, r.b, state.y, before};
  __syncwarp();
  return starts;
}

// A row's state, and N of its channels.
template <int N>
struct RowFold {
  float x[N] = {}, group[N] = {};
  float total = 0.0f, group_total = 0.0f;
  int max = kEmpty;

  __device__ __forceinline__ void add(const Factor& f, const float (&part)[N]) {
    const Rescale r = {0, f.group, f.self};
    group_total = fold(group_total, f.total, r);
#pragma unroll
    for (int i = 0; i < N; ++i) group[i] = fold(group[i], part[i], r);
  }
  // The group, of this maximum, is done.
  __device__ __forceinline__ void close(int group_max) {
    const Rescale r = rescale(max, group_max);
    max = r.max;
    total = fold(total, group_total, r);
    group_total = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = fold(x[i], group[i], r);
      group[i] = 0.0f;
    }
  }
};

}  // namespace foldkv::cuda

// Partials of split tiles become outputs: the fold of csrc/cuda/finish.cuh, in chunk order, so the bits are those of a
// worker that saw all chunks. A warp a row; the grid is fixed and walks the plan's merge list.
//
// Code is kept short, and in loops: every launch fetches it anew, and what it takes of the instruction caches the next attend
// kernel misses (docs/kernel.md).
#include "cuda/combine.h"
#include "cuda/finish.cuh"
#include "cuda/overlap.cuh"

namespace foldkv::cuda {
namespace {

// Partials that a warp waits for together; twice as many are on their way.
template <int D>
constexpr int kBatch = D > 128 ? 8 : 16;
template <int D>
constexpr int kStagedBytes = kWarps * 2 * kBatch<D> * D * 4;

// The partials of one query row and head.
template <int D>
struct Parts {
  const AttendParams& p;
  int64_t first;
  int stride, count, head;
  float* staged;  // the warp's own, in shared memory: two batches

  __device__ __forceinline__ PartialAt at(int part) const {
    return partial_at(p, first + static_cast<int64_t>(part) * stride, head, D);
  }
  // State of a partial, an empty one past the last.
  __device__ __forceinline__ float2 state(int part) const {
    return part < count ? *at(part).state : pack_state(kEmpty, 0.0f, false);
  }
  // Ask for the outputs of a batch from `part` on.
  __device__ __forceinline__ void fetch(int part, int lane) const {
    constexpr int kPieces = D / 4;  // 16 bytes each
    const uint32_t to = shared_address(staged) + part / kBatch<D> % 2 * (kBatch<D> * D * 4);
#pragma unroll 2
    for (int piece = lane; piece < kBatch<D> * kPieces; piece += 32) {
      const int i = part + piece / kPieces;
      if (i < count) copy_async(to + piece * 16, at(i).out + piece % kPieces * 4);
    }
    copy_commit();
  }
};

// What 32 partials, one a lane, are folded with; in chunk order.
struct Factors {
  unsigned starts;  // which begin a group
  int before;  // maximum of the group before this lane's partial, that of the group it begins or goes on with excepted
  float group, self, total;  // what the group has so far and the partial are multiplied by; the partial's total

  // `open`: the maximum of the group that goes on from the partials before; becomes that after these.
  __device__ __forceinline__ void set(float2 state, int& open, int lane) {
    const int max = max_of(state);
    total = state.y;
    starts = __ballot_sync(kFullWarp, starts_group(state));
    const unsigned upto = starts & (kFullWarp >> (31 - lane));
    const int begin = upto != 0 ? 31 - __clz(upto) : 0;
    int group_max = max;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kFullWarp, group_max, step);
      if (lane - step >= begin) group_max = ::max(group_max, other);
    }
    if (upto == 0) group_max = ::max(group_max, open);
    before = __shfl_up_sync(kFullWarp, group_max, 1);
    if (lane == 0) before = open;
    open = __shfl_sync(kFullWarp, group_max, 31);
    const Rescale r = rescale(starts_group(state) ? kEmpty : before, max);
    group = r.a;
    self = r.b;
  }
};

// Partials are folded into their group, groups into the row; lane l has the channels l, l + 32, ...
template <int D>
struct Row {
  static constexpr int kEach = D / 32;
  float x[kEach] = {}, group[kEach] = {};
  float total = 0.0f, group_total = 0.0f;
  int max = kEmpty;

  // Partial i of the 32.
  __device__ __forceinline__ void add(const Factors& f, int i, const float* part) {
    const Rescale r = {0, __shfl_sync(kFullWarp, f.group, i), __shfl_sync(kFullWarp, f.self, i)};
    group_total = fold(group_total, __shfl_sync(kFullWarp, f.total, i), r);
#pragma unroll
    for (int e = 0; e < kEach; ++e) group[e] = fold(group[e], part[32 * e], r);
  }

  // The group, of this maximum, is done.
  __device__ __forceinline__ void close(int group_max) {
    const Rescale r = rescale(max, group_max);
    max = r.max;
    total = fold(total, group_total, r);
    group_total = 0.0f;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      x[e] = fold(x[e], group[e], r);
      group[e] = 0.0f;
    }
  }
};

template <int D>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ AttendParams p, bool integer, float boost) {
  // The plan is older than attend, which has begun; the partials are not.
  const int32_t* plan = p.plan;
  const int4 head_a = *reinterpret_cast<const int4*>(plan), head_b = *reinterpret_cast<const int4*>(plan + kStatus);
  const unsigned most_queries = plan[kMergeQueries];
  const auto* merges = reinterpret_cast<const MergeItem*>(plan + head_a.w);
  const unsigned num_jobs = head_b.x != kPlanOk ? 0 : head_a.y * most_queries * p.h_q;  // no more than rows of queries
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  wait_for_previous();
#pragma unroll 1
  for (unsigned job = blockIdx.x * kWarps + warp; job < num_jobs; job += gridDim.x * kWarps) {
    const unsigned row_of = job / p.h_q, merge = row_of / most_queries;
    const int token = static_cast<int>(row_of - merge * most_queries), head = static_cast<int>(job - row_of * p.h_q);
    const MergeItem item = merges[merge];
    if (token >= item.q_count) continue;
    const Parts<D> parts = {p,
                            item.first_partial + token,
                            item.q_count,
                            item.parts,
                            head,
                            reinterpret_cast<float*>(shared_memory) + warp * (2 * kBatch<D> * D)};
    __syncwarp();  // all have left the partials of the row before
    float2 next = parts.state(lane);
#pragma unroll 1
    for (int batch = 0; batch < 2 * kBatch<D>; batch += kBatch<D>) parts.fetch(batch, lane);
    Row<D> row;
    int open = kEmpty;
    Factors factors;
#pragma unroll 1
    for (int part = 0; part < item.parts; part += kBatch<D>) {
      if (part % 32 == 0) {
        factors.set(next, open, lane);
        next = parts.state(part + 32 + lane);
      }
      copy_wait<1>();
      __syncwarp();
      const float* from = parts.staged + part / kBatch<D> % 2 * (kBatch<D> * D) + lane;
      const int end = min(item.parts - part, kBatch<D>) + part % 32;
#pragma unroll 2
      for (int i = part % 32; i < end; ++i, from += D) {
        if ((factors.starts >> i & 1) != 0) row.close(__shfl_sync(kFullWarp, factors.before, i));
        row.add(factors, i, from);
      }
      __syncwarp();
      parts.fetch(part + 2 * kBatch<D>, lane);
    }
    row.close(open);
    copy_wait<0>();
    finish_row<D>(p, integer, item.q_row + token, head, row.max, row.total, boost, row.x, lane);
  }
}

template <int D>
cudaError_t launch(const Device& device, const AttendParams& p, bool integer, float boost, int num_blocks,
                   cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(combine_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kStagedBytes<D>);
  if (error != cudaSuccess) return error;
  return launch_overlapping<combine_kernel<D>>(device, num_blocks, kThreads, kStagedBytes<D>, stream, p, integer,
                                               boost);
}

}  // namespace

cudaError_t combine(const Device& device, const AttendParams& p, bool integer, float boost, cudaStream_t stream) {
  const int num_blocks = 4 * device.num_sms;
  switch (p.d) {
    case 64: return launch<64>(device, p, integer, boost, num_blocks, stream);
    case 96: return launch<96>(device, p, integer, boost, num_blocks, stream);
    case 128: return launch<128>(device, p, integer, boost, num_blocks, stream);
    default: return launch<256>(device, p, integer, boost, num_blocks, stream);
  }
}

}  // namespace foldkv::cuda

// Partials of split tiles become outputs where attend's blocks do not see to it (join.cuh): sequences have many query rows. The
// fold of csrc/cuda/finish.cuh, in chunk order, so the bits are those of a worker that saw all chunks. A block a row; the grid
// is fixed and walks the plan's merge list.
//
// Code is kept short, and in loops: every launch fetches it anew, and what it takes of the instruction caches the next attend
// kernel misses (docs/kernel.md).
#include "cuda/combine.h"
#include "cuda/fold_parts.cuh"
#include "cuda/overlap.cuh"

namespace foldkv::cuda {
namespace {

constexpr int kBlocks = 6;  // a multiprocessor
// Partials that a warp waits for together; twice as many are on their way.
constexpr int kBatch = kFactors;

// A block's shared memory. Each warp has the channels 32 w .. 32 w + 31, and 128 further on where there are as many.
template <int D>
struct Staged {
  static constexpr int kEach = (D + 127) / 128;
  float part[kWarps][2][kBatch][kEach][32];
  Factor factor[kWarps][kBatch];
  float row[D];
};

// The partials of one query row and head.
template <int D>
struct Parts {
  static constexpr int kEach = Staged<D>::kEach;
  const AttendParams& p;
  int64_t first;
  int stride, count, head;

  __device__ __forceinline__ PartialAt at(int part) const {
    return partial_at(p, first + static_cast<int64_t>(part) * stride, head, D);
  }
  // State of a partial, an empty one past the last.
  __device__ __forceinline__ float2 state(int part) const { return part < count ? *at(part).state : empty_state(); }
  // Ask for this warp's channels of a batch from `part` on.
  __device__ __forceinline__ void fetch(int part, int warp, int lane, float (&staged)[2][kBatch][kEach][32]) const {
    const uint32_t to = shared_address(staged[part / kBatch % 2]);
#pragma unroll 2
    for (int piece = lane; piece < kBatch * kEach * 8; piece += 32) {  // of 16 bytes
      const int i = part + piece / (8 * kEach), channel = 32 * warp + piece % (8 * kEach) / 8 * 128 + piece % 8 * 4;
      if (i < count && channel < D) copy_async(to + piece * 16, at(i).out + channel);
    }
    copy_commit();
  }
};

template <int D>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ AttendParams p, bool integer, float boost) {
  constexpr int kEach = Staged<D>::kEach;
  auto& staged = *reinterpret_cast<Staged<D>*>(shared_memory);
  // The plan is older than attend, which has begun; the partials are not.
  const int32_t* plan = p.plan;
  const int4 head_a = *reinterpret_cast<const int4*>(plan), head_b = *reinterpret_cast<const int4*>(plan + kStatus);
  const unsigned most_queries = plan[kMergeQueries];
  const auto* merges = reinterpret_cast<const MergeItem*>(plan + head_a.w);
  const unsigned num_rows = head_b.x != kPlanOk ? 0 : head_a.y * most_queries * p.h_q;  // no more than rows of queries
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Blocks come, in their order, to where attend's first ones have ended, several to a multiprocessor. So rows that follow one
  // another, which are of the same sequence, are far apart.
  const unsigned spread = blockIdx.x % kBlocks * (gridDim.x / kBlocks) + blockIdx.x / kBlocks;
  unsigned first = spread;
  if (num_rows > 0 && num_rows < gridDim.x) {
    first = (spread * num_rows + gridDim.x - 1) / gridDim.x;
    if (first * gridDim.x / num_rows != spread) first = num_rows;
  }
  wait_for_previous();
#pragma unroll 1
  for (unsigned row_at = first; row_at < num_rows; row_at += gridDim.x) {
    const unsigned token_at = row_at / p.h_q, merge = token_at / most_queries;
    const int token = static_cast<int>(token_at - merge * most_queries),
              head = static_cast<int>(row_at - token_at * p.h_q);
    const MergeItem item = merges[merge];
    if (token >= item.q_count) continue;
    const Parts<D> parts = {p, item.first_partial + token, item.q_count, item.parts, head};
    float2 next = parts.state(lane);
    if (integer) prefetch_params(p, p.v_cache.params, D, p.group.divide(head), threadIdx.x);
    parts.fetch(0, warp, lane, staged.part[warp]);
    parts.fetch(kBatch, warp, lane, staged.part[warp]);
    RowFold<kEach> row;  // a lane has a channel of each 128
    int open = kEmpty;
#pragma unroll 1
    for (int part = 0; part < item.parts; part += kBatch) {
      const unsigned starts = set_factors(next, open, staged.factor[warp], lane);
      next = parts.state(part + kBatch + lane);
      copy_wait<1>();
      __syncwarp();
      const int count = min(item.parts - part, kBatch);
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const Factor f = staged.factor[warp][i];
        if ((starts >> i & 1) != 0) row.close(f.before);
        float channels[kEach];
#pragma unroll
        for (int e = 0; e < kEach; ++e) channels[e] = staged.part[warp][part / kBatch % 2][i][e][lane];
        row.add(f, channels);
      }
      __syncwarp();  // all have left the batch
      parts.fetch(part + 2 * kBatch, warp, lane, staged.part[warp]);
    }
    row.close(open);
    copy_wait<0>();
    __syncthreads();  // the row before has been read
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int channel = 32 * warp + 128 * e + lane;
      if (channel < D) staged.row[channel] = row.x[e];
    }
    __syncthreads();
    if (warp != 0) continue;
    float x[D / 32];
#pragma unroll
    for (int i = 0; i < D / 32; ++i) x[i] = staged.row[32 * i + lane];
    finish_row<D>(p, integer, item.q_row + token, head, head_params(p, p.v_cache, p.group.divide(head), lane), row.max,
                  row.total, boost, x, lane);
  }
}

template <int D>
cudaError_t launch(const Device& device, const AttendParams& p, bool integer, float boost, int num_blocks,
                   cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(combine_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(sizeof(Staged<D>)));
  if (error != cudaSuccess) return error;
  return launch_overlapping<combine_kernel<D>>(device, num_blocks, kThreads, static_cast<int>(sizeof(Staged<D>)),
                                               stream, p, integer, boost);
}

}  // namespace

cudaError_t combine(const Device& device, const AttendParams& p, bool integer, float boost, cudaStream_t stream) {
  const int num_blocks = kBlocks * device.num_sms;
  switch (p.d) {
    case 64: return launch<64>(device, p, integer, boost, num_blocks, stream);
    case 96: return launch<96>(device, p, integer, boost, num_blocks, stream);
    case 128: return launch<128>(device, p, integer, boost, num_blocks, stream);
    default: return launch<256>(device, p, integer, boost, num_blocks, stream);
  }
}

}  // namespace foldkv::cuda

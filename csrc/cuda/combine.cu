// Partials of split tiles become outputs: the fold of csrc/cuda/finish.cuh, in chunk order, so the bits are those of a
// worker that saw all chunks. Rows of few partials have a warp each, others a block; the grid is fixed and walks the plan's
// merge list.
#include "cuda/combine.h"
#include "cuda/finish.cuh"

namespace foldkv::cuda {
namespace {

// Code is kept short here, and in loops: what this kernel takes of the instruction caches, the next attend kernel misses.
template <int D>
constexpr int kFewParts = D > 128 ? 16 : 32;

// Partial outputs on their way to shared memory: kFewParts for each warp, or kRing slots of kStep of them for a block.
constexpr int kRing = 4;
template <int D>
constexpr int kStep = D > 128 ? 16 : 32;
template <int D>
constexpr int kStagedBytes = kRing * kStep<D> * D * 4;
static_assert(kWarps * kFewParts<128> <= kRing * kStep<128> && kWarps * kFewParts<256> <= kRing * kStep<256>, "room");

// One query row and head, and what became of its partials: sums of the channels 32 i + lane, their total and maximum.
template <int D>
struct Job {
  MergeItem item;
  int token, head;
  float x[D / 32];
  float total;
  int max;

  __device__ __forceinline__ Job(const AttendParams& p, const MergeItem* merges, unsigned most_queries, unsigned job) {
    const unsigned row = job / p.h_q;
    item = merges[row / most_queries];
    token = static_cast<int>(row % most_queries);
    head = static_cast<int>(job - row * p.h_q);
  }
  __device__ __forceinline__ PartialAt part(const AttendParams& p, int i) const {
    return partial_at(p, item.first_partial + token + static_cast<int64_t>(i) * item.q_count, head, D);
  }
  // State of a partial, an empty one past the last.
  __device__ __forceinline__ float2 state(const AttendParams& p, int i) const {
    return i < item.parts ? *part(p, i).state : pack_state(kEmpty, 0.0f, false);
  }
  // Ask for partials first .. first + count - 1, by threads 0 .. num_threads - 1; `to`: in shared memory.
  __device__ __forceinline__ void fetch(const AttendParams& p, uint32_t to, int first, int count, int thread,
                                        int num_threads) const {
    constexpr int kPieces = D / 4;  // 16 bytes each
#pragma unroll 4
    for (int piece = thread; piece < count * kPieces; piece += num_threads) {
      const int i = first + piece / kPieces;
      if (i >= item.parts) break;
      copy_async(to + piece * 16, part(p, i).out + piece % kPieces * 4);
    }
    copy_commit();
  }
};

// By a warp: parts are folded into their group, groups into the row.
template <int D>
__device__ __forceinline__ void combine_few(const AttendParams& p, Job<D>& job, int warp, int lane) {
  constexpr int kEach = D / 32;
  float* from = reinterpret_cast<float*>(shared_memory) + warp * kFewParts<D> * D;
  const float2 state = job.state(p, lane);
  __syncwarp();  // all have left the partials before
  job.fetch(p, shared_address(from), 0, kFewParts<D>, lane, 32);
  copy_wait<0>();
  __syncwarp();
  float group[kEach] = {}, group_total = 0.0f;
  int group_max = kEmpty;
#pragma unroll
  for (int e = 0; e < kEach; ++e) job.x[e] = 0.0f;
  job.total = 0.0f;
  job.max = kEmpty;
#pragma unroll 1
  for (int i = 0; i <= job.item.parts; ++i) {
    const float2 its = make_float2(__shfl_sync(kFullWarp, state.x, i & 31), __shfl_sync(kFullWarp, state.y, i & 31));
    if (i == job.item.parts || starts_group(its)) {  // the group before is done
      const Rescale r = rescale(job.max, group_max);
      job.max = r.max;
      job.total = fold(job.total, group_total, r);
      group_max = kEmpty;
      group_total = 0.0f;
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        job.x[e] = fold(job.x[e], group[e], r);
        group[e] = 0.0f;
      }
      if (i == job.item.parts) break;
    }
    const Rescale r = rescale(group_max, max_of(its));
    group_max = r.max;
    group_total = fold(group_total, its.y, r);
#pragma unroll
    for (int e = 0; e < kEach; ++e) group[e] = fold(group[e], from[i * D + 32 * e + lane], r);
  }
}

// What each of up to kThreads partials is multiplied by in its group's fold, and, where it begins a group, what the group
// before is in the row's; in chunk order.
struct Factors {
  float total[kThreads];
  float2 inside[kThreads];  // what the group has so far, the partial
  float2 closing[kThreads];  // what the row has so far, the group before
  int group_max[kThreads], row_max[kThreads];  // of the partial's group up to it; of all partials before it
  unsigned starts[kWarps];  // which partials begin a group
  int warp_group[kWarps], warp_row[kWarps];  // maxima after each warp's last partial, of that warp's alone
};

// What goes from one round of kThreads partials to the next.
struct Carried {
  int group_max = kEmpty, all_max = kEmpty,
      row_max = kEmpty;  // of the open group; of all; of all before the open group
};

__device__ __forceinline__ void share_factors(Factors& f, float2 state, Carried& carried) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, max = max_of(state);
  const unsigned starts = __ballot_sync(kFullWarp, starts_group(state));
  const unsigned upto = starts & (kFullWarp >> (31 - lane));  // group starts up to this lane
  const int begin = upto != 0 ? 31 - __clz(upto) : 0;
  int group = max, all = max;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kFullWarp, group, step), more = __shfl_up_sync(kFullWarp, all, step);
    if (lane - step >= begin) group = ::max(group, other);
    if (lane >= step) all = ::max(all, more);
  }
  __syncthreads();  // all have left the factors before
  if (lane == 31) f.warp_group[warp] = group, f.warp_row[warp] = all, f.starts[warp] = starts;
  int before = __shfl_up_sync(kFullWarp, all, 1);
  if (lane == 0) before = kEmpty;
  __syncthreads();
  int open = carried.group_max, row = carried.all_max;
#pragma unroll 1
  for (int w = 0; w < warp; ++w) {
    open = f.starts[w] != 0 ? f.warp_group[w] : ::max(open, f.warp_group[w]);
    row = ::max(row, f.warp_row[w]);
  }
  if (upto == 0) group = ::max(group, open);
  row = ::max(row, before);
  f.group_max[thread] = group;
  f.row_max[thread] = row;
  f.total[thread] = state.y;
  __syncthreads();
  const int previous = starts_group(state) ? kEmpty : thread > 0 ? f.group_max[thread - 1] : carried.group_max;
  const Rescale inside = rescale(previous, max);
  f.inside[thread] = make_float2(inside.a, inside.b);
  // The group before began at the last start before this thread; the row had all partials before that.
  int row_had = carried.row_max;
#pragma unroll 1
  for (int w = 0; w <= warp; ++w) {
    const unsigned seen = w < warp ? f.starts[w] : starts & ((1u << lane) - 1);
    if (seen != 0) row_had = f.row_max[32 * w + 31 - __clz(seen)];
  }
  const Rescale closing = rescale(row_had, thread > 0 ? f.group_max[thread - 1] : carried.group_max);
  f.closing[thread] = make_float2(closing.a, closing.b);
  // After the last partial; those past the end are empty.
  Carried after = carried;
  after.group_max = f.group_max[kThreads - 1];
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) {
    after.all_max = ::max(after.all_max, f.warp_row[w]);
    if (f.starts[w] != 0) after.row_max = f.row_max[32 * w + 31 - __clz(f.starts[w])];
  }
  carried = after;
  __syncthreads();
}

// By a block, thread t the channels t, t + 128; the first warp has the result. The same sums in the same order.
template <int D>
__device__ __forceinline__ void combine_many(const AttendParams& p, Job<D>& job, int lane) {
  constexpr int kEach = (D + kThreads - 1) / kThreads;
  __shared__ Factors f;
  __shared__ float sums[D];
  const uint32_t ring = shared_address(shared_memory);
  const int parts = job.item.parts;
  const auto fetch = [&](int step) {
    job.fetch(p, ring + step % kRing * kStep<D> * D * 4, step * kStep<D>, kStep<D>, threadIdx.x, kThreads);
  };
#pragma unroll 1
  for (int step = 0; step < kRing - 1; ++step) fetch(step);
  float2 state = job.state(p, threadIdx.x);
  Carried carried;
  float row[kEach] = {}, group[kEach] = {}, row_total = 0.0f, group_total = 0.0f;
  const auto close = [&](const Rescale& r) {  // the group before is done
    row_total = fold(row_total, group_total, r);
    group_total = 0.0f;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      row[e] = fold(row[e], group[e], r);
      group[e] = 0.0f;
    }
  };
#pragma unroll 1
  for (int step = 0; step * kStep<D> < parts; ++step) {
    const int first = step * kStep<D>, at = first % kThreads;
    if (at == 0) {
      share_factors(f, state, carried);
      state = job.state(p, first + kThreads + threadIdx.x);  // of the next ones, ahead of their use
    }
    copy_wait<kRing - 2>();
    __syncthreads();
    fetch(step + kRing - 1);
    const float* from = reinterpret_cast<const float*>(shared_memory) + step % kRing * kStep<D> * D + threadIdx.x;
    const int count = min(parts - first, kStep<D>);
    const unsigned starts = f.starts[at / 32] >> at % 32;
#pragma unroll 1
    for (int i = 0; i < count;) {
      if ((starts >> i & 1) != 0) close({0, f.closing[at + i].x, f.closing[at + i].y});
      const unsigned later = starts & ~((2u << i) - 1);
      const int stop = later != 0 ? min(__ffs(later) - 1, count) : count;
#pragma unroll 4
      for (; i < stop; ++i) {
        const Rescale r = {0, f.inside[at + i].x, f.inside[at + i].y};
        group_total = fold(group_total, f.total[at + i], r);
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          if (D % kThreads == 0 || threadIdx.x < D) group[e] = fold(group[e], from[i * D + e * kThreads], r);
        }
      }
    }
  }
  const Rescale last = rescale(carried.row_max, carried.group_max);
  close(last);
  job.max = last.max;
  copy_wait<0>();
  job.total = row_total;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    if (D % kThreads == 0 || threadIdx.x < D) sums[threadIdx.x + e * kThreads] = row[e];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < D / 32; ++i) job.x[i] = sums[32 * i + lane];
}

template <int D>
__global__ void __launch_bounds__(kThreads, 3)
    combine_kernel(const __grid_constant__ AttendParams p, bool integer, float boost) {
  // The plan is older than the kernel before; its partials are not.
  const int32_t* plan = p.plan;
  const int4 head_a = *reinterpret_cast<const int4*>(plan), head_b = *reinterpret_cast<const int4*>(plan + kStatus);
  const int most_queries = plan[kMergeQueries], most_parts = plan[kMergeParts];
  const auto* merges = reinterpret_cast<const MergeItem*>(plan + head_a.w);
  const unsigned num_jobs = head_b.x != kPlanOk ? 0 : head_a.y * most_queries * p.h_q;  // no more than rows of queries
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // First the rows of few partials, by warps; neighbours in a block have neighbouring rows. Then the others, by blocks.
  bool few = true;
  unsigned at = blockIdx.x * kWarps + warp;
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
#pragma unroll 1
  while (true) {
    if (at >= num_jobs) {
      if (!few || most_parts <= kFewParts<D>) break;
      few = false;
      at = blockIdx.x;
      __syncthreads();  // all have left their own partials
      continue;
    }
    Job<D> job(p, merges, most_queries, at);
    if (job.token < job.item.q_count && (job.item.parts <= kFewParts<D>) == few) {
      if (few) {
        combine_few<D>(p, job, warp, lane);
      } else {
        combine_many<D>(p, job, lane);
      }
      if (few || warp == 0) {
        finish_row<D>(p, integer, job.item.q_row + job.token, job.head, job.max, job.total, boost, job.x, lane);
      }
      if (!few) __syncthreads();
    }
    at += gridDim.x * (few ? kWarps : 1);
  }
}

template <int D>
cudaError_t launch(const AttendParams& p, bool integer, float boost, int num_blocks, bool overlap,
                   cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(combine_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kStagedBytes<D>);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(num_blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kStagedBytes<D>;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, combine_kernel<D>, p, integer, boost);
}

}  // namespace

cudaError_t combine(const AttendParams& p, bool integer, float boost, int num_blocks, bool overlap,
                    cudaStream_t stream) {
  switch (p.d) {
    case 64: return launch<64>(p, integer, boost, num_blocks, overlap, stream);
    case 96: return launch<96>(p, integer, boost, num_blocks, overlap, stream);
    case 128: return launch<128>(p, integer, boost, num_blocks, overlap, stream);
    default: return launch<256>(p, integer, boost, num_blocks, overlap, stream);
  }
}

}  // namespace foldkv::cuda

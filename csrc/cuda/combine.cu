// Partials of split tiles become outputs: the fold of csrc/cuda/finish.cuh, in chunk order, so the bits are those of a
// worker that saw all chunks. Rows of few partials have a warp each, others a block; the grid is fixed and walks the plan's
// merge list.
#include "cuda/combine.h"
#include "cuda/finish.cuh"

namespace foldkv::cuda {
namespace {

constexpr int kFewParts = 32;

// Partial outputs on their way to a block: kRing slots of kStep<D> of them.
constexpr int kRing = 4;
template <int D>
constexpr int kStep = D > 128 ? 16 : 32;
template <int D>
constexpr int kRingBytes = kRing * kStep<D> * D * 4;

// A row's partials folded into groups, and groups into the row, for kEach of its channels.
template <int kEach>
struct Fold {
  float row[kEach] = {}, group[kEach] = {};
  float row_total = 0.0f, group_total = 0.0f;
  int row_max = kEmpty, group_max = kEmpty;

  __device__ __forceinline__ void add(float2 state, const float (&part)[kEach]) {
    if (starts_group(state)) close();
    const Rescale r = rescale(group_max, max_of(state));
    group_max = r.max;
    group_total = fold(group_total, state.y, r);
#pragma unroll
    for (int e = 0; e < kEach; ++e) group[e] = fold(group[e], part[e], r);
  }

  // The group is done.
  __device__ __forceinline__ void close() {
    const Rescale r = rescale(row_max, group_max);
    row_max = r.max;
    row_total = fold(row_total, group_total, r);
    group_max = kEmpty;
    group_total = 0.0f;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      row[e] = fold(row[e], group[e], r);
      group[e] = 0.0f;
    }
  }
};

// What this kernel does: one query row and head.
struct Job {
  MergeItem item;
  int token, head;

  __device__ __forceinline__ Job(const AttendParams& p, const MergeItem* merges, int most_queries, int64_t job)
      : item(merges[job / p.h_q / most_queries]),
        token(static_cast<int>(job / p.h_q % most_queries)),
        head(static_cast<int>(job % p.h_q)) {}
  __device__ __forceinline__ PartialAt part(const AttendParams& p, int i, int d) const {
    return partial_at(p, item.first_partial + token + static_cast<int64_t>(i) * item.q_count, head, d);
  }
};

// A row by a warp; lane l has channels l, l + 32, ...
template <int D>
__device__ __forceinline__ void combine_few(const AttendParams& p, const Job& job, bool integer, float boost,
                                            int lane) {
  constexpr int kEach = D / 32, kAhead = D > 128 ? 8 : 16;
  const int parts = job.item.parts;
  Fold<kEach> fold;
  float2 state = make_float2(__int_as_float(2 * kEmpty), 0.0f);
  if (lane < parts) state = *job.part(p, lane, D).state;
#pragma unroll 1
  for (int first = 0; first < parts; first += kAhead) {
    float x[kAhead][kEach];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= parts) continue;
      const float* from = job.part(p, first + i, D).out + lane;
#pragma unroll
      for (int e = 0; e < kEach; ++e) x[i][e] = from[32 * e];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= parts) continue;
      const float2 its =
          make_float2(__shfl_sync(kFullWarp, state.x, first + i), __shfl_sync(kFullWarp, state.y, first + i));
      fold.add(its, x[i]);
    }
  }
  fold.close();
  finish_row<D>(p, integer, job.item.q_row + job.token, job.head, fold.row_max, fold.row_total, boost, fold.row, lane);
}

// The partials of a row on their way to a block.
template <int D>
class Parts {
 public:
  __device__ Parts(const AttendParams& p, const Job& job) : p_(p), job_(job) {
#pragma unroll
    for (int step = 0; step < kRing - 1; ++step) fetch(step);
  }

  // Step `step`, arrived; also a barrier for the block.
  __device__ const float* next(int step) {
    copy_wait<kRing - 2>();
    __syncthreads();
    fetch(step + kRing - 1);
    return reinterpret_cast<const float*>(shared_memory) + step % kRing * kStep<D> * D;
  }

 private:
  __device__ void fetch(int step) const {
    constexpr int kPieces = D / 4;  // 16 bytes each
    const uint32_t to = shared_address(shared_memory) + step % kRing * kStep<D> * D * 4;
#pragma unroll
    for (int piece = threadIdx.x; piece < kStep<D> * kPieces; piece += kThreads) {
      const int part = step * kStep<D> + piece / kPieces;
      if (part >= job_.item.parts) break;
      copy_async(to + piece * 16, job_.part(p_, part, D).out + piece % kPieces * 4);
    }
    copy_commit();
  }

  const AttendParams& p_;
  const Job& job_;
};

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
  for (int w = 0; w <= warp; ++w) {
    const unsigned seen = w < warp ? f.starts[w] : starts & ((1u << lane) - 1);
    if (seen != 0) row_had = f.row_max[32 * w + 31 - __clz(seen)];
  }
  const Rescale closing = rescale(row_had, thread > 0 ? f.group_max[thread - 1] : carried.group_max);
  f.closing[thread] = make_float2(closing.a, closing.b);
  // After the last partial; those past the end are empty.
  Carried after = carried;
  after.group_max = f.group_max[kThreads - 1];
  for (int w = 0; w < kWarps; ++w) {
    after.all_max = ::max(after.all_max, f.warp_row[w]);
    if (f.starts[w] != 0) after.row_max = f.row_max[32 * w + 31 - __clz(f.starts[w])];
  }
  carried = after;
  __syncthreads();
}

// A row by a block; thread t has channels t, t + 128. The same sums as Fold's, in the same order.
template <int D>
__device__ void combine_many(const AttendParams& p, const Job& job, bool integer, float boost) {
  constexpr int kEach = (D + kThreads - 1) / kThreads;
  __shared__ Factors f;
  __shared__ float sums[D];
  const auto state_of = [&](int part) {
    return part < job.item.parts ? *job.part(p, part, D).state : pack_state(kEmpty, 0.0f, false);
  };
  Parts<D> parts(p, job);
  float2 state = state_of(threadIdx.x);
  Carried carried;
  float row[kEach] = {}, group[kEach] = {}, row_total = 0.0f, group_total = 0.0f;
  const auto close = [&](const Rescale& r) {
    row_total = fold(row_total, group_total, r);
    group_total = 0.0f;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      row[e] = fold(row[e], group[e], r);
      group[e] = 0.0f;
    }
  };
#pragma unroll 1
  for (int step = 0; step * kStep<D> < job.item.parts; ++step) {
    const int at = step * kStep<D> % kThreads;
    if (at == 0) {
      share_factors(f, state, carried);
      state = state_of(step * kStep<D> + kThreads + threadIdx.x);  // of the next ones, ahead of their use
    }
    const float* from = parts.next(step) + threadIdx.x;
    const int count = min(job.item.parts - step * kStep<D>, kStep<D>);
    const unsigned starts = f.starts[at / 32] >> at % 32;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      if ((starts >> i & 1) != 0) close({0, f.closing[at + i].x, f.closing[at + i].y});
      const Rescale r = {0, f.inside[at + i].x, f.inside[at + i].y};
      group_total = fold(group_total, f.total[at + i], r);
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        if (D % kThreads == 0 || threadIdx.x < D) group[e] = fold(group[e], from[i * D + e * kThreads], r);
      }
    }
  }
  copy_wait<0>();
  const Rescale last = rescale(carried.row_max, carried.group_max);
  close(last);
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    if (D % kThreads == 0 || threadIdx.x < D) sums[threadIdx.x + e * kThreads] = row[e];
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    float x[D / 32];
#pragma unroll
    for (int i = 0; i < D / 32; ++i) x[i] = sums[32 * i + threadIdx.x];
    finish_row<D>(p, integer, job.item.q_row + job.token, job.head, last.max, row_total, boost, x, threadIdx.x);
  }
  __syncthreads();
}

template <int D>
__global__ void __launch_bounds__(kThreads, 3)
    combine_kernel(const __grid_constant__ AttendParams p, bool integer, float boost) {
  // The plan is older than the kernel before; its partials are not.
  const int32_t* plan = p.plan;
  const int4 head_a = *reinterpret_cast<const int4*>(plan), head_b = *reinterpret_cast<const int4*>(plan + kStatus);
  const int most_queries = plan[kMergeQueries], most_parts = plan[kMergeParts];
  const auto* merges = reinterpret_cast<const MergeItem*>(plan + head_a.w);
  const int64_t num_jobs = head_b.x != kPlanOk ? 0 : static_cast<int64_t>(head_a.y) * most_queries * p.h_q;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Neighbours of a row have their partials beside its own, so a block's warps take neighbours.
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (first < num_jobs) prefetch(merges + first / p.h_q / most_queries);
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  for (int64_t at = first; at < num_jobs; at += static_cast<int64_t>(gridDim.x) * kWarps) {
    const Job job(p, merges, most_queries, at);
    if (job.token < job.item.q_count && job.item.parts <= kFewParts) combine_few<D>(p, job, integer, boost, lane);
  }
  if (most_parts <= kFewParts) return;
  for (int64_t at = blockIdx.x; at < num_jobs; at += gridDim.x) {
    const Job job(p, merges, most_queries, at);
    if (job.token < job.item.q_count && job.item.parts > kFewParts) combine_many<D>(p, job, integer, boost);
  }
}

template <int D>
cudaError_t launch(const AttendParams& p, bool integer, float boost, int num_blocks, bool overlap,
                   cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(combine_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kRingBytes<D>);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(num_blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kRingBytes<D>;
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

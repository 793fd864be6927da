// Partials of split tiles become outputs: the fold of csrc/cuda/finish.cuh, in chunk order, so the bits are those of a
// worker that saw all chunks. One block a query row; the grid is fixed and walks the plan's merge list.
#include "cuda/combine.h"
#include "cuda/finish.cuh"

namespace foldkv::cuda {
namespace {

constexpr int kAhead = 16;  // partials on their way at a time

// What each of up to kThreads partials, and what came before it, is multiplied by; in chunk order.
struct Factors {
  float before[kThreads], self[kThreads], total[kThreads];
  int warp_max[kWarps];
};

// The maximum after all of them.
__device__ int share_factors(Factors& f, int max, float total, int carried) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = max;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kFullWarp, inclusive, step);
    if (lane >= step) inclusive = ::max(inclusive, other);
  }
  if (lane == 31) f.warp_max[warp] = inclusive;
  int exclusive = __shfl_up_sync(kFullWarp, inclusive, 1);
  if (lane == 0) exclusive = kEmpty;
  __syncthreads();
  exclusive = ::max(exclusive, carried);
  for (int w = 0; w < warp; ++w) exclusive = ::max(exclusive, f.warp_max[w]);
  const Rescale r = rescale(exclusive, max);
  f.before[threadIdx.x] = r.a;
  f.self[threadIdx.x] = r.b;
  f.total[threadIdx.x] = total;
  int last = carried;
  for (int w = 0; w < kWarps; ++w) last = ::max(last, f.warp_max[w]);
  __syncthreads();
  return last;
}

template <int D>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ AttendParams p, bool integer, float boost) {
  constexpr int kEach = (D + kThreads - 1) / kThreads;
  __shared__ Factors factors;
  __shared__ float sums[D];
  // The plan is older than the kernel before; its partials are not.
  const int32_t* plan = p.plan;
  const int4 head = *reinterpret_cast<const int4*>(plan), more = *reinterpret_cast<const int4*>(plan + kStatus);
  const int num_merges = head.y, tile_q = more.w;
  const auto* merges = reinterpret_cast<const MergeItem*>(plan + head.w);
  if (more.x == kPlanOk && static_cast<int64_t>(blockIdx.x) / p.h_q / tile_q < num_merges) {
    prefetch(merges + blockIdx.x / p.h_q / tile_q);
  }
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  if (more.x != kPlanOk) return;
  const int64_t num_jobs = static_cast<int64_t>(num_merges) * tile_q * p.h_q;
  for (int64_t job = blockIdx.x; job < num_jobs; job += gridDim.x) {
    const int head = static_cast<int>(job % p.h_q), token = static_cast<int>(job / p.h_q % tile_q);
    const MergeItem item = merges[job / p.h_q / tile_q];
    if (token >= item.q_count) continue;
    float x[kEach] = {}, total = 0.0f;
    int max = kEmpty;
    for (int begin = 0; begin < item.parts; begin += kThreads) {
      const int count = min(item.parts - begin, kThreads);
      const int64_t first = item.first_partial + static_cast<int64_t>(begin) * item.q_count + token;
      float2 state = make_float2(__int_as_float(kEmpty), 0.0f);
      if (static_cast<int>(threadIdx.x) < count) {
        state = *partial_at(p, first + static_cast<int64_t>(threadIdx.x) * item.q_count, head, D).state;
      }
      max = share_factors(factors, __float_as_int(state.x), state.y, max);
      const float* from = partial_at(p, first, head, D).out + threadIdx.x;
      const uint32_t stride = static_cast<uint32_t>(item.q_count) * p.h_q * D;  // of a tile: at most 64 rows a kv head
      for (int at = 0; at < count; at += kAhead) {
        float part[kAhead][kEach];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
#pragma unroll
          for (int e = 0; e < kEach; ++e) {
            const bool mine = at + i < count && static_cast<int>(threadIdx.x) + e * kThreads < D;
            part[i][e] = mine ? from[i * static_cast<uint64_t>(stride) + e * kThreads] : 0.0f;
          }
        }
        from += kAhead * static_cast<uint64_t>(stride);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (at + i < count) {
            const Rescale r = {0, factors.before[at + i], factors.self[at + i]};
            total = fold(total, factors.total[at + i], r);
#pragma unroll
            for (int e = 0; e < kEach; ++e) x[e] = fold(x[e], part[i][e], r);
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      if (static_cast<int>(threadIdx.x) + e * kThreads < D) sums[threadIdx.x + e * kThreads] = x[e];
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      float row[D / 32];
#pragma unroll
      for (int i = 0; i < D / 32; ++i) row[i] = sums[32 * i + threadIdx.x];
      finish_row<D>(p, integer, item.q_row + token, head, max, total, boost, row, threadIdx.x);
    }
    __syncthreads();
  }
}

template <int D>
cudaError_t launch(const AttendParams& p, bool integer, float boost, int num_blocks, bool overlap, cudaStream_t stream) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(num_blocks);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, combine_kernel<D>, p, integer, boost);
}

}  // namespace

cudaError_t combine(const AttendParams& p, bool integer, float boost, int num_blocks, bool overlap, cudaStream_t stream) {
  switch (p.d) {
    case 64: return launch<64>(p, integer, boost, num_blocks, overlap, stream);
    case 96: return launch<96>(p, integer, boost, num_blocks, overlap, stream);
    case 128: return launch<128>(p, integer, boost, num_blocks, overlap, stream);
    default: return launch<256>(p, integer, boost, num_blocks, overlap, stream);
  }
}

}  // namespace foldkv::cuda

// Partials of split tiles become outputs: the fold of csrc/cuda/finish.cuh, in chunk order, so the bits are those of a
// worker that saw all chunks. One block a query row; the grid is fixed and walks the plan's merge list.
#include "cuda/combine.h"
#include "cuda/finish.cuh"

namespace foldkv::cuda {
namespace {

// Partial outputs on their way to shared memory: kRing slots of kStep<D> of them.
constexpr int kRing = 4;
template <int D>
constexpr int kStep = D > 128 ? 16 : 32;
template <int D>
constexpr int kRingBytes = kRing * kStep<D> * D * 4;

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

// The partials of one query row of a tile, in chunk order.
template <int D>
class Parts {
 public:
  __device__ Parts(const AttendParams& p, const MergeItem& item, int token, int head)
      : p_(p), first_(item.first_partial + token), stride_(item.q_count), count_(item.parts), head_(head) {
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

  __device__ float2 state(int part) const {
    if (part >= count_) return make_float2(__int_as_float(kEmpty), 0.0f);
    return *partial_at(p_, first_ + static_cast<int64_t>(part) * stride_, head_, D).state;
  }

 private:
  __device__ void fetch(int step) const {
    constexpr int kPieces = D / 4;  // 16 bytes each
    const uint32_t to = shared_address(shared_memory) + step % kRing * kStep<D> * D * 4;
#pragma unroll
    for (int piece = threadIdx.x; piece < kStep<D> * kPieces; piece += kThreads) {
      const int part = step * kStep<D> + piece / kPieces;
      if (part >= count_) break;
      copy_async(to + piece * 16,
                 partial_at(p_, first_ + static_cast<int64_t>(part) * stride_, head_, D).out + piece % kPieces * 4);
    }
    copy_commit();
  }

  const AttendParams& p_;
  const int64_t first_;
  const int stride_, count_, head_;
};

template <int D>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ AttendParams p, bool integer, float boost) {
  constexpr int kEach = (D + kThreads - 1) / kThreads;
  __shared__ Factors factors;
  __shared__ float sums[D];
  // The plan is older than the kernel before; its partials are not.
  const int32_t* plan = p.plan;
  const int4 head_a = *reinterpret_cast<const int4*>(plan), head_b = *reinterpret_cast<const int4*>(plan + kStatus);
  const int most_queries = plan[kMergeQueries];
  const auto* merges = reinterpret_cast<const MergeItem*>(plan + head_a.w);
  const int64_t num_jobs = static_cast<int64_t>(head_a.y) * most_queries * p.h_q;
  if (head_b.x == kPlanOk && blockIdx.x < num_jobs) prefetch(merges + blockIdx.x / p.h_q / most_queries);
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  if (head_b.x != kPlanOk) return;
  for (int64_t job = blockIdx.x; job < num_jobs; job += gridDim.x) {
    const int head = static_cast<int>(job % p.h_q), token = static_cast<int>(job / p.h_q % most_queries);
    const MergeItem item = merges[job / p.h_q / most_queries];
    if (token >= item.q_count) continue;
    Parts<D> parts(p, item, token, head);
    float2 state = parts.state(threadIdx.x);
    float x[kEach] = {}, total = 0.0f;
    int max = kEmpty;
    for (int step = 0; step * kStep<D> < item.parts; ++step) {
      const int at = step * kStep<D> % kThreads;
      if (at == 0) {
        max = share_factors(factors, __float_as_int(state.x), state.y, max);
        state = parts.state(step * kStep<D> + kThreads + threadIdx.x);  // of the next ones, ahead of their use
      }
      const float* from = parts.next(step) + threadIdx.x;
      const int count = min(item.parts - step * kStep<D>, kStep<D>);
#pragma unroll 8
      for (int i = 0; i < count; ++i) {
        const Rescale r = {0, factors.before[at + i], factors.self[at + i]};
        total = fold(total, factors.total[at + i], r);
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          if (D % kThreads == 0 || static_cast<int>(threadIdx.x) + e * kThreads < D) {
            x[e] = fold(x[e], from[i * D + e * kThreads], r);
          }
        }
      }
    }
    copy_wait<0>();
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

// Merge on a GPU: partial results of the same rows over different keys, in order.
#include <cmath>
#include <cstdint>

#include "core/params.h"
#include "cuda/launch.h"
#include "cuda/rows.cuh"

namespace foldkv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLane = 8;  // channels of a thread: one or two 16-byte loads a part

// Thread i: channels kLane * (i % (d / kLane)) .. of row i / (d / kLane).
__global__ void __launch_bounds__(kThreads) merge_kernel(const MergeParams p, bool vectors) {
  const int64_t lanes = p.d / kLane, at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= p.rows * lanes) return;
  const int64_t row = at / lanes;
  const int c0 = static_cast<int>(at - row * lanes) * kLane;

  bool empty = true;
  float m = -INFINITY;
  for (int64_t part = 0; part < p.parts; ++part) {
    const float lse = p.lse[part * p.rows + row];
    empty = empty && lse == -INFINITY;
    m = fmaxf(m, lse);
  }
  float o[kLane] = {}, sum = 0.0f;
  if (!empty) {
    for (int64_t part = 0; part < p.parts; ++part) {
      const float weight = expf(p.lse[part * p.rows + row] - m);
      if (weight == 0.0f) continue;  // what an empty part holds is no number
      uint32_t raw[kLane];
      float x[kLane];
      fetch_elements(p.o, p.dtype, (part * p.rows + row) * p.d + c0, vectors, raw);
      widen_elements(raw, p.dtype, x);
      sum += weight;
#pragma unroll
      for (int i = 0; i < kLane; ++i) o[i] += weight * x[i];
    }
#pragma unroll
    for (int i = 0; i < kLane; ++i) o[i] /= sum;
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i) store_element(p.out, p.dtype, row * p.d + c0 + i, o[i]);
  if (c0 == 0) p.out_lse[row] = empty ? -INFINITY : m + logf(sum);
}

}  // namespace
}  // namespace foldkv::cuda

extern "C" int foldkv_cuda_merge(const foldkv::MergeParams* params, void* stream) {
  using namespace foldkv::cuda;
  const int64_t threads = params->rows * (params->d / kLane), blocks = (threads + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const bool vectors = reinterpret_cast<uintptr_t>(params->o) % 16 == 0;
  merge_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*params, vectors);
  return cudaGetLastError();
}

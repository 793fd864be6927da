// Copies whole pages inside a pool, as beam search and copy-on-write need it.
#include <cstdint>

#include "cuda/launch.h"

namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // 16-byte loads in flight per thread: 16 KiB per block
constexpr int64_t kTile = int64_t{kThreads} * kVectors;

// Block (x, y): pair x, tiles y, y + gridDim.y, ... of its page. page_vectors: uint4 per page.
__global__ void __launch_bounds__(kThreads)
    copy_pages_kernel(uint4* __restrict__ pool, int64_t num_pages, int64_t page_vectors,
                      const int64_t* __restrict__ src, const int64_t* __restrict__ dst) {
  const int64_t from = src[blockIdx.x];
  const int64_t to = dst[blockIdx.x];
  if (from < 0 || from >= num_pages || to < 0 || to >= num_pages) return;
  const uint4* source = pool + from * page_vectors;
  uint4* target = pool + to * page_vectors;
  for (int64_t tile = blockIdx.y * kTile; tile < page_vectors; tile += gridDim.y * kTile) {
    uint4 held[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = tile + i * kThreads + threadIdx.x;
      if (at < page_vectors) held[i] = source[at];
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = tile + i * kThreads + threadIdx.x;
      if (at < page_vectors) target[at] = held[i];
    }
  }
}

}  // namespace

extern "C" const char* foldkv_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

extern "C" int foldkv_cuda_copy_pages(void* pool, int64_t num_pages, int64_t page_bytes, const int64_t* src,
                                      const int64_t* dst, int64_t n, void* stream) {
  if (n == 0 || page_bytes == 0) return cudaSuccess;
  const int64_t page_vectors = page_bytes / int64_t{sizeof(uint4)};
  const int64_t tiles = (page_vectors + kTile - 1) / kTile;
  const dim3 grid(static_cast<unsigned>(n), static_cast<unsigned>(tiles < 65535 ? tiles : 65535));
  copy_pages_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<uint4*>(pool), num_pages,
                                                                              page_vectors, src, dst);
  return cudaGetLastError();
}

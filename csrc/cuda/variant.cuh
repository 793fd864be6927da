// One pair of formats and head_dim of the attention kernel, for the table in attend.cu.
#pragma once

#include "cuda/attend.cuh"
#include "cuda/variant.h"

namespace foldkv::cuda {

template <class K, class V, int D, int kMaxTiles>
cudaError_t launch_attend(const AttendParams& p, int num_blocks, cudaStream_t stream) {
  constexpr int kBytes = Shape<K, V, D, kMaxTiles>::kSharedBytes;
  const auto kernel = attend_kernel<K, V, D, kMaxTiles>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<num_blocks, kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

// `tiles`: of 8 query rows that sequences have on average; each kernel serves any number, and with the same bits. So where
// a block's shared memory, `max_shared` bytes, has no room for the one that suits, a smaller one does it.
template <class K, class V, int D>
cudaError_t launch_variant(const AttendParams& p, int tiles, int num_blocks, int max_shared, cudaStream_t stream) {
  // Registers are the limit: twice the channels leave them for half the rows, and so do codes on the way to fragments.
  constexpr int kMiddle = D > 128 ? 2 : 4, kWidest = D > 128 || K::kInteger || V::kInteger ? kMiddle : 8;
  if (tiles > kMiddle && Shape<K, V, D, kWidest>::kSharedBytes <= max_shared) {
    return launch_attend<K, V, D, kWidest>(p, num_blocks, stream);
  }
  if (tiles > 1 && Shape<K, V, D, kMiddle>::kSharedBytes <= max_shared) {
    return launch_attend<K, V, D, kMiddle>(p, num_blocks, stream);
  }
  if (Shape<K, V, D, 1>::kSharedBytes <= max_shared) return launch_attend<K, V, D, 1>(p, num_blocks, stream);
  return cudaErrorNotSupported;
}

}  // namespace foldkv::cuda

#define FOLDKV_INSTANTIATE(K, V, D)                                                                                  \
  cudaError_t foldkv::cuda::attend_##K##_##V##_##D(const AttendParams& p, int tiles, int num_blocks, int max_shared, \
                                                   cudaStream_t stream) {                                            \
    return launch_variant<K, V, D>(p, tiles, num_blocks, max_shared, stream);                                        \
  }

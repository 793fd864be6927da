// One pair of formats and head_dim of the attention kernel, for the table in attend.cu.
#pragma once

#include "cuda/attend.cuh"
#include "cuda/overlap.cuh"
#include "cuda/tile_maps.h"
#include "cuda/variant.h"

namespace foldkv::cuda {

template <class K, class V, int D, int kMaxRows>
cudaError_t launch_attend(const Device& device, const AttendParams& p, int num_blocks, cudaStream_t stream) {
  using S = Shape<K, V, D, kMaxRows>;
  // The grid gives a multiprocessor kBlocksPerSm blocks. Launched while others are still there, a fifth would join four where
  // there is room, and elsewhere three be left. One of sm_90 and newer has 228 KB, of which each block takes 1 KB more.
  constexpr int kFill = S::kBlocksPerSm == kBlocksPerSm ? (228 << 10) / (kBlocksPerSm + 1) : 0;
  constexpr int kNewer = S::kSharedBytes > kFill ? S::kSharedBytes : kFill,
                kOlder = Shape<K, V, D, kMaxRows, false>::kSharedBytes;
  const int bytes = device.major < 9 ? kOlder : kNewer;
  constexpr auto kKernel = attend_kernel<K, V, D, kMaxRows>;
  const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  TileMaps maps{};
  if (const cudaError_t failed = tile_maps(device, p, maps); failed != cudaSuccess) return failed;
  return launch_overlapping<kKernel>(device, num_blocks, kThreads, bytes, stream, p, maps);
}

// `rows`: query rows that sequences have on average; each kernel serves any number, and with the same bits. So where a
// block's shared memory has no room for the one that suits, the other does it.
template <class K, class V, int D, int kMaxRows>
bool has_room(const Device& device) {
  return device.max_shared >= (device.major < 9 ? Shape<K, V, D, kMaxRows, false>::kSharedBytes
                                                : Shape<K, V, D, kMaxRows, true>::kSharedBytes);
}
template <class K, class V, int D>
cudaError_t launch_variant(const Device& device, const AttendParams& p, int rows, int num_blocks, cudaStream_t stream) {
  constexpr int kMany =
      D > 128 ? 2 * kWideRows : 4 * kWideRows;  // twice the channels leave registers for half the rows
  // At 4 bits going through the keys twice, 16 rows at a time, is faster than once in the kernel with fewer warps.
  constexpr int kFew = K::kBits + V::kBits <= 8 ? 2 * kWideRows : kWideRows;
  if (rows > kFew && has_room<K, V, D, kMany>(device)) {
    return launch_attend<K, V, D, kMany>(device, p, num_blocks, stream);
  }
  if (has_room<K, V, D, kWideRows>(device)) {
    return launch_attend<K, V, D, kWideRows>(device, p, num_blocks, stream);
  }
  return cudaErrorNotSupported;
}

}  // namespace foldkv::cuda

#define FOLDKV_INSTANTIATE(K, V, D)                                                                       \
  cudaError_t foldkv::cuda::attend_##K##_##V##_##D(const Device& device, const AttendParams& p, int rows, \
                                                   int num_blocks, cudaStream_t stream) {                 \
    return launch_variant<K, V, D>(device, p, rows, num_blocks, stream);                                  \
  }

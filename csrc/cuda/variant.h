// The table of attention kernels (variants.def).
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"
#include "cuda/device.h"

namespace foldkv::cuda {

// Queues the kernel for sequences of about `rows` query rows on `num_blocks` blocks, a multiple of h_kv;
// cudaErrorNotSupported where the device has too little shared memory.
using AttendLauncher = cudaError_t (*)(const Device& device, const AttendParams& p, int rows, int num_blocks,
                                       cudaStream_t stream);

#define FOLDKV_VARIANT(K, V, D)                                                                             \
  cudaError_t attend_##K##_##V##_##D(const Device& device, const AttendParams& p, int rows, int num_blocks, \
                                     cudaStream_t stream);
#include "cuda/variants.def"
#undef FOLDKV_VARIANT

}  // namespace foldkv::cuda

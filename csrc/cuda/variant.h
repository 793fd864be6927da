// The table of attention kernels (variants.def).
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"

namespace foldkv::cuda {

// Queues the kernel for sequences of about `rows` query rows on `num_blocks` blocks, a multiple of h_kv, that have at
// most `max_shared` bytes of shared memory; cudaErrorNotSupported where none is so small.
using AttendLauncher = cudaError_t (*)(const AttendParams& p, int rows, int num_blocks, int max_shared,
                                       cudaStream_t stream);

#define FOLDKV_VARIANT(K, V, D)                                                                       \
  cudaError_t attend_##K##_##V##_##D(const AttendParams& p, int rows, int num_blocks, int max_shared, \
                                     cudaStream_t stream);
#include "cuda/variants.def"
#undef FOLDKV_VARIANT

}  // namespace foldkv::cuda

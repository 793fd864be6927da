// Attention for the formats and head dims that no tensor-core kernel is built for.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"

namespace foldkv::cuda {

cudaError_t generic_attention(const AttendParams& p, int num_sms, cudaStream_t stream);

}  // namespace foldkv::cuda

// The second half of append attention: partials of split tiles into outputs.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"
#include "cuda/device.h"

namespace foldkv::cuda {

// integer: V's codec is. boost: log2 of what the kernels scale weights by. Follows attend on the stream.
cudaError_t combine(const Device& device, const AttendParams& p, bool integer, float boost, cudaStream_t stream);

}  // namespace foldkv::cuda

// The second half of append attention: partials of split tiles into outputs.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"

namespace foldkv::cuda {

// integer: V's codec is. boost: log2 of what the kernels scale weights by. overlap: start while the kernel before still
// runs (sm_90 and newer).
cudaError_t combine(const AttendParams& p, bool integer, float boost, int num_blocks, bool overlap,
                    cudaStream_t stream);

}  // namespace foldkv::cuda

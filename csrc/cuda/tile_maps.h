// Descriptions of pools for the copy engine (csrc/cuda/tiles.cuh).
#pragma once

#include "core/params.h"
#include "cuda/device.h"
#include "cuda/tiles.cuh"

namespace foldkv::cuda {

// Of a layer's pools; nothing before sm_90, or where rows are not laid down by the copy engine. Depends on addresses and shapes
// alone, so that a captured launch has the right ones.
cudaError_t tile_maps(const Device& device, const AttendParams& p, TileMaps& maps);

}  // namespace foldkv::cuda

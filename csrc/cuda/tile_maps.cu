#include "cuda/tile_maps.h"

#include <cuda_runtime_api.h>

namespace foldkv::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver, so that nothing is linked with it.
Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

cudaError_t describe(const AttendParams& p, const Cache& cache, CUtensorMap& map) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return cudaErrorNotSupported;
  const uint64_t row = row_bytes(kCodecs[cache.format.codec].bits, p.d), page = p.page_size * row;
  // Parts of a row, and how they are swizzled: as Swizzle in attend_shape.cuh.
  const uint64_t part = row % 128 == 0 ? 128 : row;
  const bool odd = row % 32 != 0, known = odd ? row % 16 == 0 : part == 128 || part == 64 || part == 32;
  if (!known || cache.codes == nullptr) return cudaSuccess;  // not asked for
  const uint64_t tiles = (uint64_t{p.max_page} + 1) * p.h_kv;
  if (tiles > INT32_MAX) return cudaErrorNotSupported;
  const CUtensorMapSwizzle swizzle = odd           ? CU_TENSOR_MAP_SWIZZLE_NONE
                                     : part == 128 ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : part == 64  ? CU_TENSOR_MAP_SWIZZLE_64B
                                                   : CU_TENSOR_MAP_SWIZZLE_32B;
  const cuuint64_t sizes[3] = {row, static_cast<cuuint64_t>(p.page_size), tiles}, strides[2] = {row, page};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(part),
                             static_cast<cuuint32_t>(p.page_size < kTileTokens ? p.page_size : kTileTokens), 1};
  const cuuint32_t step[3] = {1, 1, 1};
  // Rows of 64 bytes come from memory by 128, or bandwidth is lost; more at a time is worse at any width.
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, cache.codes, sizes, strides, box, step,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t tile_maps(const Device& device, const AttendParams& p, TileMaps& maps) {
  if (device.major < 9) return cudaSuccess;
  if (const cudaError_t error = describe(p, p.k_cache, maps.k); error != cudaSuccess) return error;
  return describe(p, p.v_cache, maps.v);
}

}  // namespace foldkv::cuda

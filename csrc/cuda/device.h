// What launches need to know of a device; asked once.
#pragma once

#include <cuda_runtime_api.h>

namespace foldkv::cuda {

constexpr int kBlocksPerSm = 4;  // as quant.plan.BLOCKS_PER_SM

struct Device {
  int num_sms, major, max_shared;  // bytes of shared memory that a block may have
};

inline cudaError_t current_device(Device& device) {
  constexpr int kMaxDevices = 64;
  static Device known[kMaxDevices];  // num_sms 0: not asked yet; two threads that ask at once write the same
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  Device found = index < kMaxDevices ? known[index] : Device{};
  if (found.num_sms == 0) {
    error = cudaDeviceGetAttribute(&found.major, cudaDevAttrComputeCapabilityMajor, index);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&found.max_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    }
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&found.num_sms, cudaDevAttrMultiProcessorCount, index);
    if (error != cudaSuccess) return error;
    if (index < kMaxDevices) known[index] = found;
  }
  device = found;
  return cudaSuccess;
}

}  // namespace foldkv::cuda

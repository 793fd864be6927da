// Kernels that may be launched before the one ahead of them on the stream has ended (programmatic dependent launch, sm_90 on):
// their blocks take their places and fetch their code meanwhile.
#pragma once

#include <cuda_runtime.h>

#include "cuda/device.h"

namespace foldkv::cuda {

// Until the kernel ahead has ended and what it wrote can be seen. Each thread of a kernel launched by launch_overlapping calls
// it first of all; so the end of such a kernel is the end of all before it.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may be launched once every block has come here; only after wait_for_previous.
__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// kKernel on `stream`, overlapping what is ahead where device and code can.
template <auto kKernel, class... Args>
cudaError_t launch_overlapping(const Device& device, dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                               const Args&... args) {
  // Code for an older architecture, compiled for this device by the driver, does not wait.
  static const bool waits = [] {
    cudaFuncAttributes found{};
    return cudaFuncGetAttributes(&found, kKernel) == cudaSuccess && found.ptxVersion >= 90;
  }();
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = waits && device.major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kKernel, args...);
}

}  // namespace foldkv::cuda

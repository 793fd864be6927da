// What a CUDA op needs of PyTorch: the current stream, and errors as exceptions.
#pragma once

#include <dlfcn.h>

#include <cstdint>

#include "bind/check.h"
#include "cuda/launch.h"

namespace foldkv::bind {

// The current stream of `device_idx`, as a cudaStream_t. Ask at every call: the answer follows torch.cuda.stream() and graph
// capture. libtorch_cuda.so is not linked, so that the extension loads where PyTorch has no CUDA; it is looked up among
// the libraries already in memory.
inline void* current_cuda_stream(int32_t device_idx) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  check(getter != nullptr, "CUDA stream: expected libtorch_cuda.so with aoti_torch_get_current_cuda_stream, got none; ",
        "install a PyTorch built for CUDA");
  void* stream = nullptr;
  const int32_t status = getter(device_idx, &stream);
  check(status == 0, "CUDA stream: expected the current stream of device ", device_idx, ", got PyTorch error ", status);
  return stream;
}

// Throws when a launcher of cuda/launch.h returned an error.
inline void check_cuda(const char* what, int code) {
  if (code != 0) fail(what, ": expected a CUDA launch, got CUDA error ", code, ", ", foldkv_cuda_error(code));
}

}  // namespace foldkv::bind

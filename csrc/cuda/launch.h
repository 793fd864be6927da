// The C face of the CUDA kernels. Launchers queue work on `stream` (a cudaStream_t); they never wait, allocate or read
// device memory on the host, and return a cudaError_t, 0 when all is well.
#pragma once

#include <cstdint>

extern "C" {

// What an error code of this interface means.
const char* foldkv_cuda_error(int code);

// pool[dst[i]] = pool[src[i]] for i < n; pairs with an id outside 0 .. num_pages - 1 are skipped.
//   pool: uint8 [num_pages, page_bytes], 16-byte aligned, page_bytes a multiple of 16; src, dst: int64 [n].
//   A page must not be both read and written, and not written twice.
// The grid depends on n and page_bytes alone, so a captured launch serves any ids.
int foldkv_cuda_copy_pages(void* pool, int64_t num_pages, int64_t page_bytes, const int64_t* src, const int64_t* dst,
                           int64_t n, void* stream);

}  // extern "C"

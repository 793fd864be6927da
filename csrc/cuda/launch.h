// The C face of the CUDA kernels. Launchers queue work on `stream` (a cudaStream_t); they never wait, allocate or read
// device memory on the host, and return a cudaError_t, 0 when all is well.
#pragma once

#include <cstdint>

#include "core/params.h"

extern "C" {

// What an error code of this interface means.
const char* foldkv_cuda_error(int code);

// pool[dst[i]] = pool[src[i]] for i < n; pairs with an id outside 0 .. num_pages - 1 are skipped.
//   pool: uint8 [num_pages, page_bytes], 16-byte aligned, page_bytes a multiple of 16; src, dst: int64 [n].
//   A page must not be both read and written, and not written twice.
// The grid depends on n and page_bytes alone, so a captured launch serves any ids.
int foldkv_cuda_copy_pages(void* pool, int64_t num_pages, int64_t page_bytes, const int64_t* src, const int64_t* dst,
                           int64_t n, void* stream);

// Quantises num_tokens new rows of K and V into their slots; the bytes are those of csrc/cpu/append.h. Rows whose slot is
// negative or past the pools, or whose position has no row in cos, are skipped.
//   Pools and shaping matrices 16-byte aligned; matrices symmetric, their diagonals not negative. Grid and kernel depend on
//   num_tokens, h_kv, d, the formats, and on whether there are matrices, so a captured launch serves any slots.
int foldkv_cuda_append_kv(const foldkv::AppendParams* params, void* stream);

// Writes the work list of csrc/cpu/plan.cpp. Lengths that cannot be planned give a list without items, and the reason in
// the header's kStatus. One block, whatever the batch; plan 16-byte aligned.
int foldkv_cuda_plan(const foldkv::PlanParams* params, void* stream);

// Attention of every query row over its cached keys, by the work list of foldkv_cuda_plan; see csrc/cuda/attend.cuh. A plan
// that could not be made gives NaN.
//   Pools, plan and workspace 16-byte aligned. Kernel, grid and shared memory depend on shapes, formats and the device.
int foldkv_cuda_append_attention(const foldkv::AttendParams* params, void* stream);

// Combines `parts` partial results of each row, in order; an empty part (lse -inf) may hold anything.
int foldkv_cuda_merge(const foldkv::MergeParams* params, void* stream);

}  // extern "C"

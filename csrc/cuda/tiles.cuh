// Tiles of a page, one kv head's rows of up to 64 tokens, brought to shared memory by the copy engine of sm_90 (TMA), swizzled on
// the way as fragments want them. One thread asks for a tile; a barrier in shared memory counts its bytes as they come.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace foldkv::cuda {

constexpr int kTileTokens = 64;  // at most; a page's where it has fewer

// Pools of K and V as the copy engine sees them: tensors [num_pages * h_kv, page_size, bytes of a row].
struct TileMaps {
  CUtensorMap k, v;
};

// --- barriers: phases of bytes that are waited for ----------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Barriers are seen by the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// One arrival; the phase ends with the last one, and when all bytes announced have come.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Ask for the description of a tensor, before tiles of it are asked for.
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// --- copies ------------------------------------------------------------------------------------------------------------

// What streams through the L2 is to leave before what stays: queries, parameters, plans. The policy that createpolicy makes of
// L2::evict_first for all of an access.
constexpr uint64_t kEvictFirst = 0x12f0000000000000;

// A tile from byte `at` of the rows on, from token `token` of the page on; `page` counts kv heads, too.
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap& map, uint32_t barrier, int at, int token,
                                          int page) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(at), "r"(token), "r"(page), "l"(kEvictFirst)
      : "memory");
}
// A run of bytes, a multiple of 16 of them.
__device__ __forceinline__ void copy_run(uint32_t to, const void* from, uint32_t barrier, uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(kEvictFirst)
      : "memory");
}
// What this thread wrote to shared memory comes before what the copy engine will.
__device__ __forceinline__ void before_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace foldkv::cuda

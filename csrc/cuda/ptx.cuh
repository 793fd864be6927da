// The few instructions that CUDA C++ has no name for. All serve sm_80 and newer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace foldkv::cuda {

// The same number, from a place the compiler does not know: what is computed from it is computed again where it is needed
// and does not occupy registers meanwhile.
template <class T>
__device__ __forceinline__ T opaque(T x) {
  static_assert(sizeof(T) == 4, "a register");
  asm volatile("" : "+r"(x));
  return x;
}

// blockIdx.x, read anew each time, for the same reason.
__device__ __forceinline__ int block_index() {
  int x;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  return x;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// --- asynchronous copies ---------------------------------------------------------------------------------------------

// Ask for a line of global memory; nobody waits.
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L1 [%0];" ::"l"(global)); }

// 16 bytes from global to shared memory; bytes past `valid` become zero and are not fetched.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid) : "memory");
}
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `kPending` of this thread's newest groups are on their way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- shared memory to registers, 8x8 tiles of 16-bit units --------------------------------------------------------------
//
// Lane l names the 16-byte row l % 8 of tile l / 8. Plain: lane (g = l / 4, t = l % 4) gets units 2t, 2t+1 of row g.
// Transposed: it gets unit g of rows 2t and 2t+1.

__device__ __forceinline__ void load_tiles(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void load_tiles(uint32_t (&r)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void load_tiles_transposed(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// 16 bytes a lane.
__device__ __forceinline__ uint4 load_shared(uint32_t at) {
  uint4 r;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "r"(at)
               : "memory");
  return r;
}

__device__ __forceinline__ void store_shared(uint32_t at, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

// --- tensor cores: c[16x8] += a[16x16] b[16x8], fp32 sums ----------------------------------------------------------------
//
// Lane (g, t): a = rows g, g+8, g, g+8 of columns 2t (first two), 2t+8 (last two), two columns a register;
// b = column g, rows 2t and 2t+8; c = (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).

struct HalfMath {
  static constexpr float kMaxQuery = 0x1p15f;  // queries are scaled below this; fp16 holds 65504
  static constexpr float kBoost = 15.0f;       // weights are scaled by 2^15, so that small ones keep their precision
  static constexpr uint32_t kOnes = 0x3c003c00;  // two of 1.0

  __device__ static __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  // lo in the low half.
  __device__ static __forceinline__ uint32_t pack(float lo, float hi) {
    const __half2 pair = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  __device__ static __forceinline__ float2 unpack(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
};

struct Bfloat16Math {
  static constexpr float kMaxQuery = 0.0f;  // bf16 has the range of fp32: queries are taken as they are
  static constexpr float kBoost = 0.0f;
  static constexpr uint32_t kOnes = 0x3f803f80;

  __device__ static __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  __device__ static __forceinline__ uint32_t pack(float lo, float hi) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  __device__ static __forceinline__ float2 unpack(uint32_t pair) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  }
};

// --- arithmetic -------------------------------------------------------------------------------------------------------

// 2^x within 2 units in the last place; 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x within 1 unit in the last place; x not subnormal.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^n for integers n <= 0, exactly; 0 below -126.
__device__ __forceinline__ float exp2_integer(int n) { return n < -126 ? 0.0f : __int_as_float((n + 127) << 23); }

}  // namespace foldkv::cuda
